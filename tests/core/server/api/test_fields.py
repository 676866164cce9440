"""Fields of bodies that are refused or ignored: declared once, enforced where bodies are read."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx
import pytest
from litestar import Litestar, Request, Response, post
from msgspec import Struct

from trunkline.core.errors import RequestError
from trunkline.core.server.api import json_response, read_body
from trunkline.core.server.api.bodies import error_response
from trunkline.core.server.api.fields import Ignored, Refused, check_refused, declared, fields_of

pytestmark = pytest.mark.field


class Inner(Struct):
    text: str = ""
    sound: Annotated[Any, Refused("{field} can't be heard.")] = None


class Body(Struct):
    one: Inner | None = None
    many: list[Inner] = []
    later: Annotated[Any, Refused(neutral=(1, {"type": "text"}))] = None
    strict: Annotated[Any, Refused(empty=False)] = None
    user: Annotated[Any, Ignored("nobody asks")] = None


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}, [False, None, "", []], 1, {"type": "text"}])
def test_values_that_ask_for_nothing_pass(value: Any) -> None:
    check_refused(Body(later=value))


@pytest.mark.parametrize("value", [2, "x", [False, True], [{}], {"type": "json"}, 0.5])
def test_values_that_ask_for_something_are_refused(value: Any) -> None:
    with pytest.raises(RequestError, match="later is not supported yet; leave it out or set it to null") as caught:
        check_refused(Body(later=value))
    assert caught.value.param == "later"


@pytest.mark.parametrize("value", [False, 0, "", [], {}])
def test_where_empty_asks_for_something(value: Any) -> None:
    check_refused(Body(strict=None))
    with pytest.raises(RequestError, match="strict"):
        check_refused(Body(strict=value))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (Body(one=Inner(sound=1)), "one.sound"),
        (Body(many=[Inner(), Inner(sound="x")]), "many[1].sound"),
    ],
)
def test_structs_inside_are_looked_into(body: Body, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_refused(body)
    assert (caught.value.message, caught.value.param) == (f"{param} can't be heard.", param)


def test_fields_are_listed_with_their_treatment() -> None:
    listed = {name: type(mark) for name, mark in fields_of(Body)}
    nothing = type(None)
    assert listed == {
        **{"one": nothing, "one.text": nothing, "one.sound": Refused},
        **{"many": nothing, "many[].text": nothing, "many[].sound": Refused},
        **{"later": Refused, "strict": Refused, "user": Ignored},
    }
    assert list(declared(Inner)) == ["sound"]


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    @post("/", status_code=200)
    async def handler(request: Request[Any, Any, Any]) -> Response[Any]:
        return json_response((await read_body(request, Body)).user)

    def refuse(request: Request[Any, Any, Any], error: RequestError) -> Any:
        return error_response(error)

    app = Litestar([handler], exception_handlers={RequestError: refuse})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        yield client


async def test_a_route_that_reads_a_body_refuses_without_code_of_its_own(client: httpx.AsyncClient) -> None:
    refused = await client.post("/", json={"many": [{"sound": "x"}]})
    assert (refused.status_code, refused.json()) == (400, {"error": {"message": "many[0].sound can't be heard."}})
    passed = await client.post("/", content=json.dumps({"later": 0, "user": {"a": 1}, "unknown": 1}), headers=JSON)
    assert (passed.status_code, passed.json()) == (200, {"a": 1})


JSON = {"content-type": "application/json"}
