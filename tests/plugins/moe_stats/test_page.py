"""The heat map keeps to its own policy: nothing from elsewhere, nothing inline that it doesn't name."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser

import httpx

from trunkline.plugins.moe_stats.page import PAGE
from trunkline.plugins.moe_stats.page_script import SCRIPT


class Elements(HTMLParser):
    """All start tags with their attributes, and the texts of script and style."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in ("script", "style"):
            self.texts[self._inside] = self.texts.get(self._inside, "") + data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def elements() -> Elements:
    parser = Elements()
    parser.feed(PAGE.decode())
    return parser


async def test_the_policy_allows_this_script_and_style_and_nothing_else(client: httpx.AsyncClient) -> None:
    answer = await client.get("/expert_distribution/page")
    assert (answer.status_code, answer.content) == (200, PAGE)
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for kind, text in elements().texts.items():
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[f"{kind}-src"] == f"'sha256-{digest}'"


def test_nothing_comes_from_elsewhere_and_no_attribute_is_code() -> None:
    for tag, attributes in elements().tags:
        assert not {name for name in attributes if name.startswith("on") or name in ("style", "src", "action")}, tag
        assert attributes.get("href", "data:,") == "data:,"
    assert "http://" not in PAGE.decode()
    assert "https://" not in PAGE.decode()


def test_what_servers_say_never_becomes_markup() -> None:
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", SCRIPT)


def test_controls_have_names_and_tables_have_headers() -> None:
    found = elements().tags
    html = PAGE.decode()
    for tag, attributes in found:
        if tag == "input":
            assert re.search(rf'<label>[^<]+<input id="{attributes["id"]}"', html)
        if tag == "button":
            assert re.search(r"<button[^>]*>[^<]+</button>", html)
    assert found[0] == ("html", {"lang": "en"})
    ids = {attributes.get("id") for _, attributes in found}
    for _, attributes in found:
        for name in ("aria-labelledby", "aria-describedby"):
            assert name not in attributes or attributes[name] in ids
    assert 'scope: "row"' in SCRIPT
    assert 'scope: "col"' in SCRIPT
    for key in ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight", "Home", "End"):
        assert key in SCRIPT


def test_the_script_finds_what_it_looks_for() -> None:
    ids = {attributes["id"] for _, attributes in elements().tags if "id" in attributes}
    assert set(re.findall(r'at\("([\w-]+)"\)', SCRIPT)) <= ids
