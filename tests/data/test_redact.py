"""Secrets leave no trace; what people search for stays. Every secret here is made up."""

from __future__ import annotations

import random
import string
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.data import redact as module
from workbench.data.redact import PLACEHOLDER, redact, redact_all
from workbench.errors import MissingExtra

RNG = random.Random(7)


def made_up(n: int, alphabet: str = string.ascii_letters + string.digits) -> str:
    """Random characters with a digit among them."""
    return "".join(RNG.choices(alphabet, k=n - 1)) + "7"


HEX, LOWER, BASE64 = (
    "0123456789abcdef",
    string.ascii_lowercase + string.digits,
    string.ascii_letters + string.digits + "+/",
)
PEM_BODY = "\n".join(made_up(64, BASE64) for _ in range(12))
# Parts are joined so that secret scanners do not take this file for a leak.
PRIVATE_KEY = "-----BEGIN " + "RSA PRIVATE KEY-----\n" + PEM_BODY + "\nabc=\n-----END " + "RSA PRIVATE KEY-----"
PROVIDERS = {
    "openai": "sk-" + "proj-" + made_up(48),
    "anthropic": "sk-" + "ant-api03-" + made_up(90) + "-" + made_up(5),
    "aws id": "AKIA" + made_up(16, string.ascii_uppercase + string.digits),
    "github": "ghp_" + made_up(36),
    "github fine": "github" + "_pat_" + made_up(22) + "_" + made_up(59),
    "gitlab": "glpat-" + made_up(20),
    "google": "AIza" + made_up(35),
    "slack": "xoxb-" + "123456789012-" + made_up(24),
    "stripe": "sk_" + "live_" + made_up(24),
    "stripe test": "sk_" + "test_" + made_up(24),
    "hugging face": "hf_" + made_up(34),
    "npm": "npm_" + made_up(36),
    "pypi": "pypi-" + "AgEIcHlwaS5vcmc" + made_up(80),
    "sendgrid": "SG." + made_up(22) + "." + made_up(43),
    "twilio": "SK" + made_up(32, HEX),
    "telegram": "1234567890:" + made_up(35),
    "discord": "M" + made_up(24) + "." + made_up(6) + "." + made_up(27),
    "azure": "AccountKey=" + made_up(86) + "==",
    "square": "sq0csp-" + made_up(43),
    "mailchimp": made_up(32, HEX) + "-us12",
    "vault": "hvs." + made_up(24),
    "digital ocean": "dop_v1_" + made_up(64, HEX),
    "databricks": "dapi" + made_up(32, HEX),
    "age": "AGE-SECRET-KEY-1" + made_up(58, string.ascii_uppercase + string.digits),
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + made_up(43),
}
#: (name, text in which the secret stands, the secret)
CONTEXTS = [
    ("environment", "export DB_PASSWORD={}\n", "hunterhunter"),
    ("environment, digits only", "PGPASSWORD={} psql -h db", "88347112"),
    ("dotenv", "REDIS_URL=redis://localhost\nSESSION_SECRET={}\nPORT=80", made_up(32)),
    ("python", 'client = Client(password="{}", timeout=3)', "korrekt horse"),
    ("python spaces", "api_key = '{}'", made_up(12)),
    ("yaml", "db:\n  user: app\n  password: {}\n  port: 5432", "T0p!secret"),
    ("json", '{{"user": "a", "password": "{}", "n": 1}}', "s3cr3t-value"),
    ("json in json", '"{{\\"client_secret\\": \\"{}\\", \\"n\\": 1}}"', made_up(24)),
    ("escaped newline", "FOO=1\\nDB_PASSWORD={}\\nBAR=2", "Abcdefghij1"),
    ("go", 'cfg.APIKey := "{}"', made_up(20)),
    ("java", 'setPassword => "{}"', "geheim99"),
    ("xml", "<db><password>{}</password></db>", "x9-abc-77"),
    ("flag", "mytool login --password {} --verbose", "Passw0rdXY"),
    ("flag of two words", "tool login --token-secret {} --verbose", "zXc4vBn5mAs6"),
    ("flag, short token", "tool --token {} run", "a7c9e1x3"),
    ("flag equals", "mytool --api-key={} run", made_up(16)),
    ("prose", "the staging password is {}, please use it", "Blau-Wal!42"),
    ("url", "postgres://app:{}@db.internal:5432/main", "p4ss.word-x"),
    ("url with sign", "mysql://root:{}@10.0.0.3/main", "pa@ss!1"),
    ("url with slash", "postgresql+psycopg2://app:{}@db.internal:5432/main", "p/ss@w/0rd"),
    ("url with slash, no user", "REDIS_URL=redis://:{}@cache:6379/0", "a/bC9+"),
    ("url with slash, escaped", "A=mongodb+srv://u:{}@c0.x.net/db\\nMAIL_FROM=x@y", "a/b/c"),
    ("fish", "set -gx GITHUB_TOKEN {}\n", "a7c9e1x3"),
    ("fish, quoted", "set --export DB_PASSWORD '{}'; and ls", "korrekt horse"),
    ("password said in prose", 'log in as bob, use password "{}" there', "two words"),
    ("SQL", "CREATE USER app WITH PASSWORD '{}';", "hunterhunter"),
    ("token in url", "git clone https://{}@github.com/o/r.git", made_up(40)),
    ("bearer", 'curl -H "Authorization: Bearer {}" https://x.dev', made_up(30)),
    ("basic", "Authorization: Basic {}\n", "YWxhZGRpbjpvcGVuc2VzYW1l"),
    ("cookie", "Cookie: session={}; theme=dark\r\n", made_up(26)),
    ("header", "x-api-key: {}", made_up(32, HEX)),
    ("old token", "github_token: {}", made_up(40, HEX)),
    ("token", "ACCESS_TOKEN={}", made_up(24)),
    ("query", "GET /v1?user=7&access_token={}&page=2", made_up(32)),
    ("signed url", "https://b.s3.amazonaws.com/k?X-Amz-Signature={}&a=1", made_up(64, HEX)),
    ("aws secret", "aws_secret_access_key = {}", made_up(40, BASE64)),
    ("curl user", "curl -u admin:{} https://x.dev", "letmein-9"),
    ("netrc", "machine x.dev login bob password {}", "qwertz12"),
    ("sshpass", "sshpass -p '{}' ssh host", "tr0mbone"),
    ("webhook", "https://discord.com/api/webhooks/123456/{}", made_up(68)),
    ("e-mail", "Author: Jo <{}>", "jo.doe+x@corp-mail.co.uk"),
    (
        "token wrapped at 76 columns",
        "Authorization: Bearer {}\n",
        "eyJhbGciOiJIUzI1NiJ9." + made_up(50) + "\n" + made_up(70),
    ),
    ("key wrapped, escaped", "x {}\\nnext", "sk-" + "ant-" + made_up(60) + "\\n  " + made_up(30)),
    ("docker login", "docker login -u me -p {} registry.dev", "Pa55w0rd"),
    ("mysql", "mysql -u root -p{} shop", "Pa55w0rd"),
    ("redis", "redis-cli -h r -a {} ping", "Pa55w0rd"),
    ("docker config", '{{"auths": {{"r.dev": {{"auth": "{}"}}}}}}', "bWU6SnJPWVBhQkVjV3Ry"),
    ("npmrc", "//registry.dev/:_auth={}", "bWU6SnJPWVBhQkVjV3Ry"),
    ("smtp", "SMTP_PASS={}\n", "xkcd-Correct9"),
    ("escaped quotes", "{{\\u0022password\\u0022: \\u0022{}\\u0022}}", "Hunter2xyz"),
    ("key in base64", "client-key-data: {}\n", "LS0tLS1CRUdJTi" + "BQUklWQVRFIEtFWS0tLS0t" + made_up(80, BASE64)),
    ("set-cookie in JSON", '"set-cookie": "{}"', "sid=s%3A" + made_up(32) + "; Path=/"),
    ("long", "secret = '{}'", made_up(3000, BASE64)),
    ("long bare", "CLIENT_SECRET={}", made_up(3000)),
]
KEEP = [
    "commit 9fceb02d0ae598e95dc970b74767f19372d61af8 (HEAD -> main)",
    "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "session 019dad77-8919-7173-a0d5-61b781415e5a, id toolu_01A9b8C7d6E5f4G3h2I1j0",
    'test id = "dGVzdC1pZC0xMjM0NTY3ODkwYWJjZGVm"',
    "cache_key: 9fceb02d0ae598e95dc970b74767f19372d61af8",
    "primary key: 019dad77-8919-7173-a0d5-61b781415e5a",
    "max_tokens=4096, num_tokens: 12000, token_count = 77",
    "def login(user: str, password: str, token: Optional[str] = None):",
    "password = getpass.getpass(); api_key = os.environ['API_KEY']; secret = self.config.secret",
    "password: ${{ secrets.DB_PASSWORD }} and PASSWORD=$DB_PASSWORD and password=<your password>",
    "OPENAI_API_KEY_ENV=WB_KEY; password_file: /run/secrets/db",
    "git@github.com:owner/repo.git, Co-Authored-By: Bot <noreply@corp.dev>, icon@2x.png, lodash@4.17.21",
    "http://localhost:8080/path and https://example.org/a?b=c&key=name, docker run -u 1000:1000 x",
    "https://medium.com/@user/post https://host:8080/@scope/pkg ssh://git@host:22/a/b@v1 npm i @types/node@20",
    "https://cdn.dev:443/npm/lodash@4.17/x postgres://db:5432/main?role=a@b redis://h:6379/0,redis://i:6379/0@x",
    "git@github.com:a/b.git https://x.dev/a:b/c@v2 mongodb://u:${PASS}/x@h kafka://broker/topic:a/b@c",
    "set -x; set -euo pipefail; set -gx PATH /usr/bin; set -x API_KEY $OTHER; set -gx API_KEY (pass show api)",
    'the password "field" is required: password "must contain a digit", use password manager "keepass"',
    "the secret is required, the token is invalid, key: value, tokenizer: bert-base-uncased",
    "Traceback: KeyError: 'assistant_text' in memory/exchanges.py:214",
    "hf_hub_download_with_retries_v2, npm_package_dependencies_react_18, r8_g8_b8_a8_unorm_texture_format",
    "jina-embeddings-v2-base-en, pplx-70b-online-chat-preview, sk-learn-contrib-lightning-0.6.2",
    "Cookie: the browser keeps it; mysql -u root -p; docker compose -p myproject1 up; second_pass: depth9",
    "LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUM2VENDQWRHZ0F3SUJBZ0lCQURBTg==",
]


@pytest.mark.parametrize("name", PROVIDERS)
def test_provider_keys_go_wherever_they_stand(name: str) -> None:
    secret = PROVIDERS[name]
    for around in (
        "{}",
        "see {} here",
        '"{}"',
        "x={}&y=1",
        "a\\n{}\\nb",
        "\x1b[32m{}\x1b[0m",
        "- {}\n",
        "%3D{}",
        "({})",
    ):
        out = redact(around.format(secret))
        assert secret not in out.text
        assert secret[-12:] not in out.text, "a part of the secret is left"
        assert sum(out.findings.values()) >= 1


@pytest.mark.parametrize(("name", "text", "secret"), CONTEXTS, ids=[c[0] for c in CONTEXTS])
def test_values_beside_a_credentials_name_go_and_the_rest_stays(name: str, text: str, secret: str) -> None:
    out = redact(text.format(secret))
    assert secret not in out.text
    before, _, after = text.replace("{{", "{").replace("}}", "}").partition("{}")
    if name != "cookie":
        assert PLACEHOLDER.sub("", out.text) == before + after
    assert sum(out.findings.values()) == 1


@pytest.mark.parametrize("text", KEEP)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text).text == text
    assert redact(text).findings == {}


@pytest.mark.parametrize(
    "block",
    [
        PRIVATE_KEY,
        PRIVATE_KEY.replace("\n", "\\n"),
        PRIVATE_KEY.replace("\n", "\n    "),
        PRIVATE_KEY.split("\nabc=")[0],
        PRIVATE_KEY[:400],
        PRIVATE_KEY.split("-----\n", 1)[1],
        PRIVATE_KEY.replace("RSA ", "").replace("KEY-----", "KEY BLOCK-----"),
        "PuTTY-User-Key-File-3: ssh-rsa\nPrivate-Lines: 12\n" + PEM_BODY + "\nPrivate-MAC: 0123",
    ],
    ids=["whole", "escaped", "indented", "end missing", "cut", "begin missing", "pgp", "putty"],
)
def test_private_keys_of_many_lines(block: str) -> None:
    out = redact(f"cat id_rsa\n{block}\n\nthe deploy failed with error 17")
    for at in range(0, len(PEM_BODY) - 16, 8):
        assert PEM_BODY[at : at + 16] not in out.text
    assert out.text.startswith("cat id_rsa\n")
    assert out.text.endswith("the deploy failed with error 17")


def test_a_token_in_the_place_of_a_user_goes_with_its_stand_in_password() -> None:
    assert redact(f"https://{'a1' * 20}:x-oauth-basic@github.com/o/r.git").text.startswith("https://[REDACTED:")


def test_same_secret_same_placeholder_also_where_it_stands_alone() -> None:
    key, other = PROVIDERS["github"], "ghp_" + made_up(36)
    first, second = redact_all([f"use {key} not {other}; password: Kn0ck-kn0ck", f"ran with {key}: Kn0ck-kn0ck failed"])
    assert first.text == "use [REDACTED:github-token] not [REDACTED:github-token-2]; password: [REDACTED:password]"
    assert second.text == "ran with [REDACTED:github-token]: [REDACTED:password] failed"
    assert second.findings == {"[REDACTED:github-token]": 1, "[REDACTED:password]": 1}


def test_placeholders_of_an_earlier_run_are_not_given_to_another_secret() -> None:
    text = f"[REDACTED:github-token] and {PROVIDERS['github']}"
    assert redact(text).text == "[REDACTED:github-token] and [REDACTED:github-token-2]"


def test_user_names_only_on_request() -> None:
    text = r"/home/alice/x.py /Users/bob/y C:\Users\carol\z C:\\Users\\dan\\w"
    assert redact(text).text == text
    out = redact(text, user_names=True)
    assert not any(n in out.text for n in ("alice", "bob", "carol", "dan"))
    assert out.text.startswith("/home/[REDACTED:user]/x.py")


FRAGMENTS = st.sampled_from(
    [*PROVIDERS.values(), *(t.format(s) for _, t, s in CONTEXTS[:-2]), *KEEP, PRIVATE_KEY, PRIVATE_KEY[:90], "\n", " ",
     '"', "[REDACTED:password]", "[REDACTED:", "password=", "-----END PRIVATE KEY-----", "://a:"]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.lists(st.one_of(FRAGMENTS, st.text(max_size=12)), max_size=8))
def test_idempotent_on_any_mixture(pieces: list[str]) -> None:
    once = redact("".join(pieces))
    again = redact(once.text)
    assert again.text == once.text
    assert again.findings == {}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(PROVIDERS)), st.text(max_size=60), st.text(max_size=60))
def test_provider_key_goes_from_any_lines(name: str, before: str, after: str) -> None:
    assert PROVIDERS[name] not in redact(f"{before}\n{PROVIDERS[name]}\n{after}").text


@pytest.mark.parametrize(
    "unit",
    ["sk-", "eyJ", "://a:b", "password=", 'password="', "-----BEGIN PRIVATE KEY-----", "xoxb-1-", "a@", "A", " "],
)
def test_hostile_repetition_ends(unit: str) -> None:
    text = (unit * 100_000)[:100_000]
    assert redact(redact(text).text).text == redact(text).text


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("detect_secrets")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "detect_secrets", None)
    module._patterns.cache_clear()
    with pytest.raises(MissingExtra, match=r"\[llm\]"):
        redact("x")
    module._patterns.cache_clear()
