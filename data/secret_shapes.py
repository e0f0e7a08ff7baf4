"""Shapes that are a secret wherever they stand: provider keys, tokens, headers, URLs and commands with a password."""

from __future__ import annotations

import re

# Not inside a word; the letter of an escape (\\n, a colour's m, %3D, \\u0022) is no word.
_B = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt])|(?<=\dm)|(?<=%[0-9A-F][0-9A-F])|(?<=\\u[0-9a-f]{4}))"
_FILE_ENDINGS = "png|jpe?g|gif|svg|webp|ico|js|ts|tsx|jsx|py|css|json|md|html|service|timer|target"
# A stretch that no word and no name in lower case has: `sk-learn-pipeline-2` is no key, `jina-embeddings-v2` no token.
_RUN = r"(?=[A-Za-z0-9_=-]{0,60}[A-Za-z0-9]{16})"
_SERVERS = "postgres(?:ql)?|mysql|mariadb|mongodb|mssql|clickhouse|rediss?|amqps?|mqtts?|nats|kafka|ldaps?"
#: (kind, literal that must occur, pattern; its group 1 if it has one, must the secret have a digit)
SHAPES: tuple[tuple[str, str, re.Pattern[str], bool], ...] = (
    ("api-key", "sk-", re.compile(_B + rf"sk-{_RUN}[A-Za-z0-9_-]{{20,}}"), True),
    ("api-key", "_", re.compile(_B + r"(?:hf|gsk|r8|npm|fw|sbp|ntn|lin_api|rnd|phx|phc)_[A-Za-z0-9]{20,}"), True),
    ("api-key", "_", re.compile(_B + r"(?:figd|dckr_pat|glsa|fo1|fm2)_" + _RUN + r"[A-Za-z0-9_-]{20,}"), True),
    ("api-key", "_", re.compile(_B + r"(?:whsec|sntrys)_[A-Za-z0-9_+/=-]{20,}"), True),
    ("api-key", "secret_", re.compile(_B + r"secret_[A-Za-z0-9]{43}(?![A-Za-z0-9_])"), True),
    ("api-key", "_", re.compile(_B + r"(?:sk|rk|pk)_(?:live|test)_[A-Za-z0-9]{16,}"), False),
    ("api-key", "_", re.compile(_B + r"(?:lsv2_(?:pt|sk)|shp(?:at|ss|ca|pa)|do[opr]_v1)_[A-Za-z0-9_]{20,}"), True),
    ("api-key", "", re.compile(_B + r"(?:nvapi|pplx|xai|tvly|tskey|PMAK|NRAK|CFPAT|xapp|xoxe|pcsk|ATATT|jina)"
                               r"[-_0-9a-z]?" + _RUN + r"[A-Za-z0-9_=-]{20,}"), True),
    ("api-key", ".", re.compile(_B + r"(?:dp\.(?:st|pt|ct)\.[\w.-]{0,40}[A-Za-z0-9]{40}"
                                r"|pat[A-Za-z0-9]{14}\.[0-9a-f]{64})"), False),
    ("api-key", "", re.compile(_B + r"(?:dapi|key-)[0-9a-f]{32}(?![0-9a-f])"), False),
    ("api-key", "", re.compile(r"pypi-AgE[A-Za-z0-9_-]{16,}|github_pat_[A-Za-z0-9_]{22,}"
                               r"|AGE-SECRET-KEY-1[A-Z0-9]{20,}"
                               r"|(?:AIza[A-Za-z0-9_-]{15}|ya29\.|GOCSPX-|hv[sbr]\.)[A-Za-z0-9_-]{20,}"), False),
    ("webhook", "/webhooks/", re.compile(r"/api/webhooks/\d+/([A-Za-z0-9_-]{20,})"), False),
    ("jwt", "eyJ", re.compile(_B + r"eyJ[A-Za-z0-9_=-]{8,}\.[A-Za-z0-9_=-]{4,}(?:\.[A-Za-z0-9_.+/=-]*)?"), False),
    ("bearer", "earer", re.compile(r"\b[Bb]earer\s+([A-Za-z0-9._~+/=-]{8,})"), True),
    ("authorization", "uthorization", re.compile(r"[Aa]uthorization\\?[\"']?\s*[:=]\s*\\?[\"']?(?:Basic|Token|token|"
                                                 r"ApiKey|Digest)\s+([^\s\"'\\]{6,})"), False),
    ("cookie", "ookie", re.compile(r"\b(?:[Ss]et-)?[Cc]ookie(?:\\?[\"'])?:[ \t]*(?:\\?[\"'])?"
                                   r"(?=[^\r\n\"';\\]*=)([^\r\n\"'\\]{8,})"), False),
    ("private-key", "LS0tLS1CRUdJTi", re.compile(r"LS0tLS1CRUdJTi(?!BDRVJU|BQVUJM)[A-Za-z0-9+/]{20,}={0,2}"), False),
    ("authorization", "auth", re.compile(r"(?:\"auth\\?\"\s*:\s*\\?\"|:_auth\s*=\s*\"?)"
                                         r"([A-Za-z0-9+/]{12,}={0,2})"), True),
    ("password", "://", re.compile(r"://[^\s:/@\"'<>]{0,200}:([^\s/\"'<>]{1,200})@(?=[\w.\[-])"), False),
    # Only there is what holds a "/" no path; after a port it is one.
    ("password", "://", re.compile(rf"\b(?:{_SERVERS})(?:\+\w{{1,20}})?://[^\s:/@\"'<>]{{0,200}}:(?!\d{{1,5}}/)"
                                   r"([^\s/@\"'<>]{0,200}/(?:(?!://|\\[nrt])[^\s\"'<>]){0,200})@(?=[\w.\[-])"), False),
    ("api-key", "://", re.compile(r"://([A-Za-z0-9_-]{16,200})(?::x-oauth-basic)?@(?=[\w.\[-])"), True),
    ("signature", "=", re.compile(r"[?&](?:sig|signature|X-Amz-Signature|X-Amz-Security-Token|X-Goog-Signature)="
                                  r"([^&\s\"'<>\\]{16,})"), False),
    ("password", "login", re.compile(r"\blogin\s+\S{1,100}\s+password\s+(\S+)"), False),
    ("password", "sshpass", re.compile(r"\bsshpass\s+-p\s*['\"]?([^\s'\"]+)"), False),
    ("password", "login", re.compile(r"\b(?:docker|podman|oras|helm registry) login\b[^\r\n|;&]{0,200}?\s-p[ =]?"
                                     r"(?:\\?[\"'])?([^\s\"'\\]{3,})"), False),
    ("password", " -p", re.compile(r"\b(?:mysql(?:dump|admin)?|mariadb(?:-dump)?)\b[^\r\n|;&]{0,200}?\s-p"
                                   r"(?:\\?[\"'])?([^\s\"'\\]{3,})"), False),
    ("password", "redis-cli", re.compile(r"\bredis-cli\b[^\r\n|;&]{0,200}?\s(?:-a|--pass)[ =](?:\\?[\"'])?"
                                         r"([^\s\"'\\]{3,})"), False),
    ("password", "-", re.compile(r"(?<=\s)(?:-u|--user|--proxy-user)[ =]['\"]?[^\s:'\"]{1,100}:"
                                 r"([^\s'\"]*[^\s'\"\d][^\s'\"]*)"), False),
    ("email", "@", re.compile(r"(?<![\w.+%-])(?!(?:git|no-?reply)@)[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,6}"
                              rf"(?!(?:{_FILE_ENDINGS})\b)[A-Za-z]{{2,24}}\b"), False),
)  # fmt: skip
