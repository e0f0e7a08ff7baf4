"""Takes secrets out of a text before it leaves the machine.

Three layers: shapes that are a secret wherever they stand (provider keys, private keys, tokens, URLs with a password,
e-mail addresses; detect-secrets' detectors and what they lack), values that stand beside a credential's name
(`password=…`), and every other place where a value found so stands alone. Long random strings without such a
context (git hashes, UUIDs, digests, test ids) stay: they are what people search for.

Of detect-secrets (1.5) are not used: KeywordDetector, BasicAuthDetector and NpmDetector (the rules here are wider), the
two entropy detectors but for their entropy (see above), IPPublicDetector (no secret), JwtTokenDetector (its last, lazy
group leaves the signature in the text) and OpenAIDetector (quadratic on long runs; `secret_shapes` has it).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

from workbench.data.secret_shapes import SHAPES
from workbench.errors import MissingExtra

#: What stands for a secret; the number tells secrets of a kind apart. Never derived from the secret: a hash of a short
#: password can be searched for.
PLACEHOLDER = re.compile(r"\[REDACTED:[a-z0-9-]+\]")


@dataclass(frozen=True, slots=True)
class Redacted:
    """A text without its secrets; `findings` counts what each placeholder replaced (never the secret itself)."""

    text: str
    findings: dict[str, int] = field(default_factory=dict)


class _Span(NamedTuple):
    start: int
    end: int
    kind: str


def redact(text: str, *, user_names: bool = False) -> Redacted:
    """Replaces every secret by a placeholder; doing it twice changes nothing.

    Args: user_names: also replaces the user's name in home directories (/home/NAME, C:\\Users\\NAME).

    Raises: MissingExtra if detect-secrets is not installed.
    """
    return redact_all([text], user_names=user_names)[0]


def redact_all(texts: Sequence[str], *, user_names: bool = False) -> list[Redacted]:
    """Like redact, for texts that belong together: a secret found in one is replaced in all, by the same name."""
    names, current = _Names(texts), list(texts)
    counts: list[Counter[str]] = [Counter() for _ in texts]
    # A replacement can uncover a match that its text had hidden; each round leaves fewer characters that are not
    # placeholders, so this ends, and what it ends with is a fixed point.
    while any(found := [_find(t, user_names) for t in current]):
        for text, spans in zip(current, found, strict=True):
            names.learn(text, spans)
        current = [names.replace(t, s, c) for t, s, c in zip(current, found, counts, strict=True)]
    return [Redacted(t, dict(c)) for t, c in zip(current, counts, strict=True)]


class _Names:
    """Gives each secret its placeholder, in the order in which they are found."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._of_secret: dict[str, str] = {}
        self._used = {p for t in texts for p in PLACEHOLDER.findall(t)}
        self._alone: set[str] = set()

    def learn(self, text: str, spans: list[_Span]) -> None:
        for start, end, kind in spans:
            secret = text[start:end]
            name = self._name(secret, kind)
            for part in re.split(r"[=;]\s*", secret) if kind == "cookie" else [secret]:
                if len(part) >= 8 and _is_mixed(part) and kind not in ("email", "user"):
                    self._alone.add(part)
                    self._of_secret.setdefault(part, name)

    def _name(self, secret: str, kind: str) -> str:
        if secret not in self._of_secret:
            name, n = f"[REDACTED:{kind}]", 1
            while name in self._used:
                n += 1
                name = f"[REDACTED:{kind}-{n}]"
            self._used.add(name)
            self._of_secret[secret] = name
        return self._of_secret[secret]

    def replace(self, text: str, spans: list[_Span], counts: Counter[str]) -> str:
        merged = _merge(spans + list(self._elsewhere(text)))
        out: list[str] = []
        last = 0
        for start, end, kind in merged:
            name = self._name(text[start:end], kind)
            counts[name] += 1
            out += [text[last:start], name]
            last = end
        return "".join([*out, text[last:]])

    def _elsewhere(self, text: str) -> Iterator[_Span]:
        """Where known secrets stand without anything that would give them away."""
        for secret in self._alone:
            kind = self._of_secret[secret][10:-1]
            for low, high in _segments(text):
                at = text.find(secret, low, high)
                while at >= 0:
                    yield _Span(at, at + len(secret), kind)
                    at = text.find(secret, at + len(secret), high)


def _segments(text: str) -> Iterator[tuple[int, int]]:
    """The stretches between placeholders: nothing is looked for in a placeholder or across one."""
    last = 0
    for m in PLACEHOLDER.finditer(text):
        if m.start() > last:
            yield last, m.start()
        last = m.end()
    if last < len(text):
        yield last, len(text)


def _merge(spans: Iterable[_Span]) -> list[_Span]:
    """Overlapping spans become one, of the kind that begins first (the longest of those)."""
    out: list[_Span] = []
    for span in sorted(spans, key=lambda s: (s.start, -s.end)):
        if out and span.start < out[-1].end:
            if span.kind != "email":  # what follows a password in a URL is its host
                out[-1] = out[-1]._replace(end=max(out[-1].end, span.end))
        else:
            out.append(span)
    return out


def _find(text: str, user_names: bool) -> list[_Span]:
    """All secrets of the text; spans do not overlap."""
    spans: list[_Span] = []
    for low, high in _segments(text):
        piece = text[low:high]
        found = [*_private_keys(piece), *_shapes(piece), *_detectors(piece), *_assignments(piece)]
        if user_names:
            found += [_Span(*m.span(1), "user") for m in _HOME.finditer(piece)]
        spans += [_Span(s + low, e + low, kind) for s, e, kind in found]
    return _merge(spans)


# --- private keys -----------------------------------------------------------------------------------------------------

_KEY_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----")
_KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,30}PRIVATE KEY(?: BLOCK)?-----")
_KEY_BODY = re.compile(
    r"(?:[A-Za-z0-9+/=]{16,}|[A-Za-z0-9+/=]+(?=\s*-----END|\Z)|\\[nr]|[\s>|]"
    r"|(?:Proc-Type|DEK-Info|Version|Comment): ?[^\n\\]*)*"
)
_KEY_TAIL = re.compile(r"(?:\s|[nr]\\)*[A-Za-z0-9+/=]*(?:(?:\s|[nr]\\)+[A-Za-z0-9+/=]{40,})*")  # read backwards
_PUTTY = re.compile(r"Private-Lines: \d+\s+((?:[A-Za-z0-9+/=]+\s+)+?)(?=Private-MAC|$|\n\s*\n)")
_MAX_KEY_CHARS = 20_000  # a 16,384-bit RSA key in PEM has 12,700


def _private_keys(text: str) -> Iterator[_Span]:
    """Key blocks, also when a log cut off one of their ends or their newlines are escaped."""
    last = 0
    for m in _KEY_BEGIN.finditer(text):
        if m.start() < last:
            continue
        end = _KEY_END.search(text, m.end(), m.end() + _MAX_KEY_CHARS)
        other = _KEY_BEGIN.search(text, m.end(), end.end()) if end else None
        body = _KEY_BODY.match(text, m.end())
        last = end.end() if end and not other else body.end() if body else m.end()
        yield _Span(m.start(), last, "private-key")
    for m in _KEY_END.finditer(text):
        if m.start() >= last:
            tail = _KEY_TAIL.match(text[max(last, m.start() - _MAX_KEY_CHARS) : m.start()][::-1])
            yield _Span(m.start() - (tail.end() if tail else 0), m.end(), "private-key")
            last = m.end()
    if "Private-Lines:" in text:
        yield from (_Span(*m.span(1), "private-key") for m in _PUTTY.finditer(text))


# --- shapes that are secrets anywhere ---------------------------------------------------------------------------------

_URL_HEAD = re.compile(r"://[^\s/?#]*\Z")
_HOME = re.compile(r"(?:/home/|/Users/|\b[A-Za-z]:\\{1,2}Users\\{1,2})([A-Za-z0-9_.-]+)")


def _shapes(text: str) -> Iterator[_Span]:
    for kind, literal, pattern, needs_digit in SHAPES:
        if literal not in text:
            continue
        for m in pattern.finditer(text):
            start, end = m.span(pattern.groups and 1)
            secret = text[start:end]
            is_stand_in = kind == "password" and _STANDS_FOR_A_VALUE.match(secret)
            is_login = kind == "email" and _URL_HEAD.search(text, max(0, start - 200), start)
            if not is_stand_in and not is_login and not (needs_digit and not any(map(str.isdigit, secret))):
                yield _Span(start, _end_of_wrapped(text, start, end) if kind in _WRAPPED else end, kind)


_WRAPPED = ("api-key", "jwt", "bearer")
_NEXT_LINE = re.compile(r"(?:\\*\r?\n|\\+[nr])[ \t]*([A-Za-z0-9_.-]{16,})(?![^\s\"'`,;)\\])")


def _end_of_wrapped(text: str, start: int, end: int) -> int:
    """Where a token ends that a terminal or an editor has cut into lines: the next ones begin as randomly."""
    while end - start >= 30 and (m := _NEXT_LINE.match(text, end)):
        rest = m.group(1)
        if rest.lower() == rest or rest.upper() == rest or not _is_random(rest, is_hex_random=True):
            break
        end = m.end()
    return end


# --- detect-secrets ---------------------------------------------------------------------------------------------------


#: (kind, module and class in detect_secrets.plugins, literals of which one must occur in the lower-cased text)
_DETECTORS = (
    ("artifactory", "artifactory", "ArtifactoryDetector", ("akc", "ap")),
    ("aws-key", "aws", "AWSKeyDetector", ("aws", "a3t", "abia", "acca", "akia", "asia")),
    ("azure-key", "azure_storage_key", "AzureStorageKeyDetector", ("accountkey=",)),
    ("cloudant", "cloudant", "CloudantDetector", ("cl",)),
    ("discord-token", "discord", "DiscordBotTokenDetector", (".",)),
    ("github-token", "github_token", "GitHubTokenDetector", ("ghp_", "gho_", "ghu_", "ghs_", "ghr_")),
    ("gitlab-token", "gitlab_token", "GitLabTokenDetector", ("gl", "gr1348941")),
    ("ibm-key", "ibm_cloud_iam", "IbmCloudIamDetector", ("key", "pass", "pwd", "token")),
    ("ibm-key", "ibm_cos_hmac", "IbmCosHmacDetector", ("secret",)),
    ("mailchimp-key", "mailchimp", "MailchimpDetector", ("-us",)),
    ("pypi-token", "pypi_token", "PypiTokenDetector", ("pypi-",)),
    ("sendgrid-key", "sendgrid", "SendGridDetector", ("sg.",)),
    ("slack-token", "slack", "SlackDetector", ("xox", "hooks.slack.com")),
    ("softlayer", "softlayer", "SoftlayerDetector", ("sl",)),
    ("square-key", "square_oauth", "SquareOAuthDetector", ("sq0csp-",)),
    ("stripe-key", "stripe", "StripeDetector", ("k_live_",)),
    ("telegram-token", "telegram_token", "TelegramBotTokenDetector", (":",)),
    ("twilio-key", "twilio", "TwilioKeyDetector", ("ac", "sk")),
)


def _plugin(module: str, name: str) -> Any:
    try:
        return getattr(import_module(f"detect_secrets.plugins.{module}"), name)
    except ImportError as e:
        raise MissingExtra(f"Redacting secrets needs detect-secrets, which cannot be imported ({e})", "llm") from e


@cache
def _patterns() -> list[tuple[str, tuple[str, ...], tuple[re.Pattern[str], ...]]]:
    return [(kind, literals, tuple(_plugin(module, name).denylist)) for kind, module, name, literals in _DETECTORS]


@cache
def _entropies() -> tuple[Any, ...]:
    return tuple(_plugin("high_entropy_strings", f"{base}HighEntropyString")() for base in ("Base64", "Hex"))


def _detectors(text: str) -> Iterator[_Span]:
    """detect-secrets' patterns, by their whole match: `analyze_string` gives only the prefix of a GitHub token."""
    lowered = text.lower()
    for kind, _, patterns in (row for row in _patterns() if any(x in lowered for x in row[1])):
        for pattern in patterns:
            for m in pattern.finditer(text):
                group = next((g for g in range(1, pattern.groups + 1) if len(m.group(g) or "") >= 16), 0)
                start, end = m.span(group)
                # Some patterns take the delimiters along.
                start = end - len(text[start:end].lstrip(" \t\r\n=:\"'"))
                end = start + len(text[start:end].rstrip(" \t\r\n\"'"))
                if any(map(str.isdigit, text[start:end])):
                    yield _Span(start, end, kind)


# --- values beside a credential's name --------------------------------------------------------------------------------

_STRONG = (
    r"passw(?:or)?d|passwort|passphrase|pwd|secret|contrase[nñ]a|mot_de_passe|db[_-]?pass|(?<=_)pass(?![a-z])|"
    r"credentials?|(?:api|access|"
    r"account|auth|client|encryption|license|master|priv|private|service|shared|signing|storage|subscription)[_-]?key"
)
_WEAK = r"token|bearer|session[_-]?id|key"
_NAME = re.compile(rf"(?:{_STRONG}|{_WEAK})[\w-]{{0,24}}", re.IGNORECASE)
_STRONG_NAME = re.compile(_STRONG)
_SEPARATOR = re.compile(
    r"(?:\\*(?:[\"'`\])]|\\u002[27])){0,2}[ \t]{0,4}(?P<sign>:=|=>|={1,3}|!==?|:|\b(?:is|was)\b)[ \t]{0,4}"
)
_FLAG = re.compile(r"[ \t]+|=")
_FISH = re.compile(r"\bset[ \t]+(?:-\w*[xgU]\w*|--(?:export|global|universal))(?:[ \t]+-[\w-]+)*[ \t]+\Z")
_FISH_VALUE = re.compile(r"[ \t]+(?!\()")
_SAID = re.compile(r"\b(?:us(?:e[ds]?|ing)|with|try|encrypted)[ \t]+(?:(?:the|this|my)[ \t]+)?\Z", re.IGNORECASE)
_SAID_VALUE = re.compile(r"[ \t]+(?=\\*[\"'][^\s\"'])")
_MARKUP = re.compile(r">(?=[^<\s])")
_QUOTED = re.compile(r"(?P<q>\\*(?:[\"'`]|\\u002[27]))(?P<value>(?:(?!(?P=q))[^\r\n]){1,8000})(?P=q)")
_BARE = re.compile(r"(?:\\*[\"'`])?(?P<value>[^\s\"'`]{1,600})")
_REST_OF_BARE = re.compile(r"[^\s\"'`]*")
_NEXT_PAIR = re.compile(r"[,;&](?=\s*[\w.-]+[=:])|\\[nrt]|</")
_IDENTIFIER = re.compile(r"[A-Za-z_$][\w$.]*(?:[\[(].*|\?|!)?$")
_STANDS_FOR_A_VALUE = re.compile(
    r"(?:\W*$|\*{3,}|\.{3}|x{4,}|<[^>]*>?$|\$[A-Z_]+$|\$[a-z_]+$|\$[({]|%\w+%|%[sdr]\b|\{+[\w .]*\}*$|"
    r"\[redacted|your[-_ ]|(?:\\+u002[27])+$|"
    r"(?:changeme|change_me|example|placeholder|redacted|none|null|nil|true|false|undefined|todo|required|optional|"
    r"password|passwd|secret|token|string|str|bool|int|bytes|any|value|empty|unset|missing|pass)\W*$)",
    re.IGNORECASE,
)
_HEX_OR_UUID = re.compile(r"(?:0x)?[0-9a-fA-F-]+$")
_RANDOM_SYMBOLS = set("!@#$%^*+?~")


def _assignments(text: str) -> Iterator[_Span]:
    """Values given to a credential's name in code, configuration, JSON (escaped too), environment, flags and prose."""
    last = 0
    for m in _NAME.finditer(text):
        if m.start() < last:
            continue
        prefix = _prefix(text, m.start())
        separator = _separator(text, m, prefix)
        value = separator and (_QUOTED.match(text, separator.end()) or _BARE.match(text, separator.end()))
        if not separator or not value:
            continue
        start, end = value.span("value")
        if value.re is _BARE:
            cut = _NEXT_PAIR.search(text, start, end)
            end = cut.start() if cut else end
            end = start + len(text[start:end].rstrip(".,;:)}]>\\"))
        name = prefix + m.group()
        is_shell = (
            prefix.startswith("--") or separator.re is _FISH_VALUE or (name.isupper() and separator.group() == "=")
        )
        is_quoted = value.re is _QUOTED
        if m.group().lower() == "pass" and not is_shell:  # SMTP_PASS=…, but no second_pass: …
            continue
        if end > start and _is_secret(text[start:end], name.lower(), is_quoted, is_shell):
            rest = _REST_OF_BARE.match(text, end) if end - start == 600 else None
            last = rest.end() if rest else end
            yield _Span(start, last, "password" if re.search("pass|pwd", m.group().lower()) else "credential")


def _prefix(text: str, end: int) -> str:
    """The part of the name before its credential word, with the dashes of a flag; without the letter of an escape."""
    start = end
    while start > max(0, end - 40) and (text[start - 1].isalnum() or text[start - 1] in "-_."):
        start -= 1
    is_escape = start < end and text[start - 1 : start] == "\\" and text[start] in "nrt"
    return text[start + is_escape : end]


def _separator(text: str, name: re.Match[str], prefix: str) -> re.Match[str] | None:
    """What stands between a name and its value, if it is something that assigns."""
    found = _SEPARATOR.match(text, name.end())
    if not found and prefix.startswith("--"):
        found = _FLAG.match(text, name.end())
    start = name.start() - len(prefix)
    before = text[max(0, start - 80) : start]
    if not found and before.endswith("<"):
        found = _MARKUP.match(text, name.end())
    if not found and _FISH.search(before):
        found = _FISH_VALUE.match(text, name.end())
    if not found and not prefix and name.group().lower().startswith("pass") and _SAID.search(before):
        found = _SAID_VALUE.match(text, name.end())
    return found


def _is_secret(value: str, name: str, is_quoted: bool, is_shell: bool) -> bool:
    """Whether the value of this name is a secret rather than code, a type, a count or an example's stand-in."""
    if _STANDS_FOR_A_VALUE.match(value) or name.endswith(("_env", "_file", "_path", "_name", "_url", "-file", "-env")):
        return False
    if not _STRONG_NAME.search(name):
        is_given = is_shell and name.endswith("token") and len(value) >= 8 and _is_mixed(value)
        return is_given or _is_random(value, is_hex_random="token" in name or "bearer" in name)
    if is_quoted:
        return len(value) >= 3 and (" " not in value.strip() or "pass" in name)
    if is_shell:
        return len(value) >= 4 and not value.startswith(("/", "-"))
    if value.isdigit():
        return len(value) >= 6 and name.endswith(("pass", "password", "passwd", "pwd"))
    if _IDENTIFIER.match(value) and ("." in value or "(" in value or "[" in value or not any(map(str.isdigit, value))):
        return False
    return len(value) >= 4 and (_is_mixed(value) or _is_random(value, is_hex_random=True))


def _is_mixed(value: str) -> bool:
    """Letters and digits, or a symbol that words and paths do not have."""
    return (any(map(str.isdigit, value)) and any(map(str.isalpha, value))) or not _RANDOM_SYMBOLS.isdisjoint(value)


def _is_random(value: str, *, is_hex_random: bool) -> bool:
    """High entropy by detect-secrets' measure, in bits a character (Base64 above 4.0, hexadecimal above 3.0)."""
    base64, hexadecimal = _entropies()
    if _HEX_OR_UUID.match(value):
        digits = value.replace("-", "")
        return is_hex_random and len(digits) >= 24 and hexadecimal.calculate_shannon_entropy(digits) > 3.0
    if len(value) < 16 or not _is_mixed(value) or not re.fullmatch(r"[A-Za-z0-9+/=_.~:-]+", value):
        return False
    return base64.calculate_shannon_entropy(value) > (3.5 if is_hex_random else 4.0)
