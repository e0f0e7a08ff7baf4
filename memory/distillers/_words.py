"""Words that say little about an exchange: function words are never kept, chatter is kept last."""

from __future__ import annotations

# Function words of English, and what shortened forms leave behind.
_FUNCTION_WORDS = """
a an the this that these those it its itself i me my mine myself we us our ours you your yours yourself he him his
she her hers they them their theirs who whom whose which what when where why how and or but nor so yet if then else
than as at by for from in into of off on onto out over per to up upon via with within without about above after
again against along among around before behind below beneath beside between beyond down during except inside near
outside since through throughout till toward under until while whether because though although unless
am is are was were be been being do does did doing done have has had having can could may might must shall should
will would ought let lets not no yes ok okay there here also any all both each either neither every few more most
much many other another some such same own only just very too quite rather really even ever never always often
still already almost now once twice soon later perhaps maybe please thanks thank well oh hmm etc eg ie vs like
i'm i'll i've i'd you're you'll you've we're we'll we've they're it's that's there's here's what's let's who's
don't doesn't didn't isn't aren't wasn't weren't won't wouldn't can't couldn't shouldn't hasn't haven't hadn't
im ive dont doesnt didnt isnt cant ll ve re
"""
FUNCTION = frozenset(_FUNCTION_WORDS.split())

# Words that nearly every exchange with a coding agent holds, whatever it is about; written by hand, with a look at the
# frequent stems of the development corpus.
_CHATTER_WORDS = """
add added adding address agent allow answer appear apply approach appropriate ask asked available back base based
before behavior best better bit bug build call called calls case cases cause change changed changes check checked
checking checks clean clear code come command comment commit committed complete completed confirm contain contains
content context continue correct correctly count cover create created creates current currently data default define
detail details detect differ different directory do does edit empty end ensure entry error errors everything exact
exactly example exist existing exists expect expected explicit fail failed failing fails failure feature file files
final find fine first fix fixed fixes follow following format found four full fully function functions generate get
gets git give go goes going good great handle handled handles handling happen happens helper home id idea implement
implementation implemented import include included includes including info input instead issue issues keep kind know
last left level line lines list local logic long look looking looks made main make makes making match matching mean
means message method might minor missing modified modify move multiple name need needed needs new next note nothing
number old one ones open operation option options order original output package part pass passed passes passing path
pattern place plan point possible previous problem process project prompt properly provide put question quick read
reading ready real reason related relevant remain remaining remove removed replace request require required result
results return returned returns review right run running runs same save say scenario second section see seems sense
separate set setup share should show showing shows similar simple simply since single skip small something specific
start started state status step steps stop store string structure success successfully suggest summary support sure
take task tell test tested testing tests text thing things think three time together tool total tree tried trigger
true try turn two type types understand unit update updated updates updating use used user uses using valid value
values variable verify version via view want wanted wants warn way without work worked working works would write
writing wrong yet you zero first seem false null none nil err
"""
CHATTER = frozenset(_CHATTER_WORDS.split()) - FUNCTION
