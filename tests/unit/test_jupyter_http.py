"""The Jupyter interface over fake sandboxes: models, status codes and errors as its clients know them, and owners."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
import yaml
from tornado.httpclient import HTTPResponse

from gateway.access_log import shown_uri
from gateway.cors import CorsPolicy
from gateway.limits import OwnerBounds
from gateway.notebook_sessions import MAX_PER_KERNEL
from kernelprovisioner.pool import PoolFull
from tests.unit.served_api import KEY, OTHER_KEY, Api, served

NOWHERE = "00000000-0000-4000-8000-000000000000"
NOTEBOOK = {"path": "work/a.ipynb", "name": "a.ipynb", "type": "notebook", "kernel": {"name": "sandbox"}}


async def ask(api: Api, method: str, path: str, body: Any = None, *, status: int = 200, **more: Any) -> Any:
    """The JSON of an answer that has this status."""
    response = await api.call(method, path, body, **more)
    assert response.code == status, (response.code, response.body)
    return json.loads(response.body) if response.body else None


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 (what is waited for has no event)
            await asyncio.sleep(0.005)


async def open_notebook(api: Api, **fields: Any) -> Any:
    return await ask(api, "POST", "/api/sessions", NOTEBOOK | fields, status=201)


async def start_kernel(api: Api, **fields: Any) -> Any:
    return await ask(api, "POST", "/api/kernels", fields, status=201)


async def test_a_kernel_has_the_model_that_jupyter_server_reads() -> None:
    async with served() as api:
        response = await api.call("POST", "/api/kernels", {"name": "sandbox", "env": {"A": "1", "B": None}, "new": []})
        model = json.loads(response.body)
        assert (response.code, response.headers["Location"]) == (201, f"/api/kernels/{model['id']}")
        assert set(model) == {"id", "name", "last_activity", "execution_state", "connections"}
        assert (model["name"], model["execution_state"], model["connections"]) == ("sandbox", "idle", 0)
        # As jupyter_server's gateway client does it.
        datetime.strptime(model["last_activity"], "%Y-%m-%dT%H:%M:%S.%fZ")
        assert api.pool.claims[0][1].env == {"A": "1"}
        assert await ask(api, "GET", "/api/kernels") == [model]
        assert await ask(api, "GET", f"/api/kernels/{model['id']}") == model
        assert await ask(api, "POST", f"/api/kernels/{model['id']}/interrupt", {}, status=204) is None
        assert await ask(api, "DELETE", f"/api/kernels/{model['id']}", status=204) is None
        assert await ask(api, "GET", "/api/kernels") == []


async def test_microseconds_are_there_also_where_there_are_none() -> None:
    async with served() as api:
        await start_kernel(api)
        (kernel,) = api.kernels.everything()
        kernel.last_activity = datetime(2026, 1, 31, tzinfo=UTC)
        (model,) = await ask(api, "GET", "/api/kernels")
        assert model["last_activity"] == "2026-01-31T00:00:00.000000Z"


@pytest.mark.parametrize("raw", [b"", b"null", b" {} \n", b'{"name": null, "path": null, "env": null}'])
async def test_a_body_without_anything_starts_the_default_kernel(raw: bytes) -> None:
    async with served() as api:
        assert (await ask(api, "POST", "/api/kernels", raw=raw, status=201))["name"] == "sandbox"


@pytest.mark.parametrize(
    ("path", "raw", "field"),
    [
        ("/api/kernels", b"[]", ""),
        ("/api/kernels", b'"x"', ""),
        ("/api/kernels", b"{", ""),
        ("/api/kernels", b"\xff", ""),
        ("/api/kernels", b"[" * 100_000, ""),
        ("/api/kernels", b'{"name": 1}', "name"),
        ("/api/kernels", b'{"name": "julia"}', "name"),
        ("/api/kernels", b'{"path": {}}', "path"),
        ("/api/kernels", b'{"env": {"A": 1}}', "env[...]"),
        ("/api/kernels", b'{"env": []}', "env"),
        ("/api/kernels", b'{"env": {"A=B": "1"}}', "env.A=B"),
        ("/api/kernels", b'{"env": {"": "1"}}', "env."),
        ("/api/kernels", b'{"env": {"A": "\\u0000"}}', "env.A"),
        ("/api/kernels", b'{"env": {"A": "' + b"x" * 70_000 + b'"}}', "env"),
        ("/api/kernels", b'{"kernel_id": "x"}', "kernel_id"),
        ("/api/kernels", b'{"kernel_id": "00000000-0000-4000-8000-00000000000A"}', "kernel_id"),
        ("/api/sessions", b"", "path"),
        ("/api/sessions", b'{"path": null, "type": "notebook"}', "path"),
        ("/api/sessions", b'{"path": "a"}', "type"),
        ("/api/sessions", b'{"path": "a\\u0000", "type": "notebook"}', "path"),
        ("/api/sessions", b'{"path": "a", "type": "file", "kernel": "sandbox"}', "kernel"),
        ("/api/sessions", b'{"path": "a", "type": "file", "kernel": {"name": "julia"}}', "kernel.name"),
        ("/api/sessions", b'{"path": "a", "type": "file", "kernel": {"id": "x"}}', "kernel.id"),
    ],
)
async def test_what_is_wrong_in_a_body_is_a_400_that_names_it(path: str, raw: bytes, field: str) -> None:
    async with served() as api:
        answer = await ask(api, "POST", path, raw=raw, status=400)
        assert set(answer) == {"message", "reason", "code", "errors", "request_id"}
        assert (answer["reason"], answer["errors"][0]["field"]) == ("Bad Request", field)
        assert api.pool.made == [] and api.kernels.everything() == []


async def test_what_is_not_there_is_a_404_on_every_verb() -> None:
    async with served() as api:
        for method, path in (
            *(("GET", f"/api/kernels/{NOWHERE}"), ("DELETE", f"/api/kernels/{NOWHERE}")),
            *(("POST", f"/api/kernels/{NOWHERE}/restart"), ("POST", f"/api/kernels/{NOWHERE}/interrupt")),
            *(("GET", f"/api/sessions/{NOWHERE}"), ("DELETE", f"/api/sessions/{NOWHERE}")),
            *(("PATCH", f"/api/sessions/{NOWHERE}"), ("GET", "/api/kernelspecs/julia")),
            *(("GET", "/kernelspecs/sandbox/kernel.json"), ("GET", "/kernelspecs/sandbox/..%2Fkernel.json")),
            *(("GET", "/api/contents"), ("GET", "/api/kernels/"), ("GET", "/kernelspecs/a/b/c")),
        ):
            assert set(await ask(api, method, path, status=404)) >= {"message", "reason"}, path
        wrong = await api.call("PATCH", "/api/kernels")
        assert (wrong.code, wrong.headers["Allow"]) == (405, "GET, POST, OPTIONS")
        assert (await api.call("GET", "/api/v1/nothing")).headers["Content-Type"] == "application/problem+json"


async def test_kernels_and_sessions_of_others_are_not_there_on_any_verb() -> None:
    async with served() as api:
        chosen = str(uuid.uuid4())
        session = await open_notebook(api, kernel={"id": chosen})
        assert session["kernel"]["id"] == chosen
        for method, path in (
            *(("GET", f"/api/kernels/{chosen}"), ("DELETE", f"/api/kernels/{chosen}")),
            *(("POST", f"/api/kernels/{chosen}/restart"), ("POST", f"/api/kernels/{chosen}/interrupt")),
            *(("GET", f"/api/sessions/{session['id']}"), ("PATCH", f"/api/sessions/{session['id']}")),
            ("DELETE", f"/api/sessions/{session['id']}"),
        ):
            others = await ask(api, method, path, {}, status=404, key=OTHER_KEY)
            nobodys = await ask(api, method, path.replace(chosen, NOWHERE), {}, status=404, key=OTHER_KEY)
            shown = [re.sub(r"[0-9a-f-]{36}", "ID", answer["message"]) for answer in (others, nobodys)]
            assert shown[0] == shown[1]
        assert await ask(api, "GET", "/api/kernels", key=OTHER_KEY) == []
        assert await ask(api, "GET", "/api/sessions", key=OTHER_KEY) == []
        # The same id and the same path are theirs to take; a second time they are not.
        twin = await ask(api, "POST", "/api/kernels", {"kernel_id": chosen}, status=201, key=OTHER_KEY)
        assert twin["id"] == chosen
        assert await ask(api, "POST", "/api/kernels", {"kernel_id": chosen}, status=409)
        other = await ask(api, "POST", "/api/sessions", NOTEBOOK, status=201, key=OTHER_KEY)
        assert other["id"] != session["id"] and other["kernel"]["id"] != chosen
        assert len(await ask(api, "GET", "/api/sessions")) == 1


async def test_two_posts_of_one_path_are_one_session_also_at_once() -> None:
    async with served() as api:
        first, second = await asyncio.gather(open_notebook(api), open_notebook(api))
        assert first == second
        assert first["notebook"] == {"path": "work/a.ipynb", "name": "a.ipynb"}
        assert set(first) == {"id", "path", "name", "type", "kernel", "notebook"}
        assert len(api.pool.made) == 1
        assert api.pool.claims[0][1].session_name == "work/a.ipynb"
        console = await open_notebook(api, path="console-1", type="console", kernel={"id": first["kernel"]["id"]})
        assert "notebook" not in console and console["kernel"] == first["kernel"]
        assert await ask(api, "GET", "/api/sessions") == [first, console]


async def test_old_clients_name_the_notebook_otherwise() -> None:
    async with served() as api:
        old = await ask(api, "POST", "/api/sessions", {"notebook": {"path": "a.ipynb"}}, status=201)
        assert (old["path"], old["type"], old["kernel"]["name"]) == ("a.ipynb", "notebook", "sandbox")


async def test_a_session_is_renamed_and_gets_another_kernel() -> None:
    async with served() as api:
        session = await open_notebook(api)
        path = f"/api/sessions/{session['id']}"
        renamed = await ask(api, "PATCH", path, {"path": "b.ipynb", "name": "b.ipynb", "kernel": None})
        assert (renamed["path"], renamed["notebook"]["name"]) == ("b.ipynb", "b.ipynb")
        assert renamed["kernel"] == session["kernel"]
        assert await ask(api, "PATCH", path, None) == renamed
        changed = await ask(api, "PATCH", path, {"type": "file", "kernel": {"name": "python3"}})
        assert (changed["type"], changed["kernel"]["name"]) == ("file", "python3")
        assert [kernel["id"] for kernel in await ask(api, "GET", "/api/kernels")] == [changed["kernel"]["id"]]
        other = await start_kernel(api)
        moved = await ask(api, "PATCH", path, {"kernel": {"id": other["id"], "name": "ignored"}})
        assert moved["kernel"] == other
        assert await ask(api, "GET", "/api/kernels") == [other]
        answer = await ask(api, "PATCH", path, {"kernel": {"id": NOWHERE}}, status=400)
        assert answer["errors"][0]["field"] == "kernel.id"
        assert await ask(api, "GET", path) == moved


async def test_a_kernel_that_another_session_uses_outlives_the_change() -> None:
    async with served() as api:
        session = await open_notebook(api)
        console = await open_notebook(api, path="console", type="console", kernel={"id": session["kernel"]["id"]})
        await ask(api, "PATCH", f"/api/sessions/{session['id']}", {"kernel": {"name": "sandbox"}})
        assert await ask(api, "GET", f"/api/sessions/{console['id']}") == console


async def test_a_session_goes_with_its_kernel_and_the_other_way_round() -> None:
    async with served() as api:
        session = await open_notebook(api)
        await ask(api, "DELETE", f"/api/kernels/{session['kernel']['id']}", status=204)
        assert await ask(api, "GET", "/api/sessions") == []
        session = await open_notebook(api)
        await ask(api, "DELETE", f"/api/sessions/{session['id']}", status=204)
        assert await ask(api, "GET", "/api/kernels") == []


async def test_a_session_that_goes_while_its_new_kernel_starts_leaves_no_kernel() -> None:
    async with served() as api:
        session = await open_notebook(api)
        path = f"/api/sessions/{session['id']}"
        api.pool.gate = asyncio.Event()
        changing = asyncio.create_task(api.call("PATCH", path, {"kernel": {"name": "sandbox"}}))
        await until(lambda: len(api.kernels.everything()) == 2)
        await ask(api, "DELETE", path, status=204)
        api.pool.gate.set()
        assert (await changing).code == 404
        assert await ask(api, "GET", "/api/kernels") == []


async def test_the_notebook_of_a_dead_kernel_gets_a_new_one() -> None:
    async with served() as api:
        session = await open_notebook(api)
        (kernel,) = api.kernels.everything()
        kernel.execution_state, kernel.reason, kernel.traceback = "dead", "Killed.", "SandboxDied: Killed."
        (dead,) = [one["kernel"] for one in await ask(api, "GET", "/api/sessions")]
        assert (dead["execution_state"], dead["reason"], dead["traceback"]) == ("dead", kernel.reason, kernel.traceback)
        again = await open_notebook(api)
        assert again["kernel"]["id"] != session["kernel"]["id"]
        assert [one["id"] for one in await ask(api, "GET", "/api/sessions")] == [again["id"]]
        assert (await ask(api, "GET", "/api/status"))["kernels"] == 1


async def test_one_kernel_has_a_bounded_number_of_sessions() -> None:
    async with served() as api:
        kernel = {"id": (await start_kernel(api))["id"]}
        for number in range(MAX_PER_KERNEL):
            await open_notebook(api, path=f"{number}", kernel=kernel)
        await ask(api, "POST", "/api/sessions", NOTEBOOK | {"kernel": kernel}, status=429)
        assert len(await ask(api, "GET", "/api/kernels")) == 1


async def test_full_is_a_503_and_an_owner_s_limit_a_429_with_retry_after() -> None:
    async with served(owner_bounds=OwnerBounds(sessions=1)) as api:
        api.pool.error = PoolFull("all places are taken", 7)
        for path, body in (("/api/kernels", {}), ("/api/sessions", NOTEBOOK)):
            response = await api.call("POST", path, body)
            assert (response.code, response.headers["Retry-After"]) == (503, "7")
            assert json.loads(response.body)["message"] == "All places are taken."
        api.pool.error = None
        await start_kernel(api)
        response = await api.call("POST", "/api/kernels", {})
        assert response.code == 429 and "Retry-After" in response.headers
        assert len(api.kernels.everything()) == 1


async def test_who_hangs_up_leaves_no_kernel() -> None:
    async with served() as api:
        api.pool.gate = asyncio.Event()
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        head = f"POST /api/kernels HTTP/1.1\r\nHost: x\r\nx-api-key: {KEY}\r\nContent-Length: 0\r\n\r\n"
        writer.write(head.encode())
        await until(api.kernels.everything)
        writer.close()
        await writer.wait_closed()
        await until(lambda: not api.kernels.everything())
        assert api.pool.made == []


async def test_kernelspecs_have_logos_and_aliases() -> None:
    async with served() as api:
        found = await ask(api, "GET", "/api/kernelspecs")
        assert (found["default"], set(found["kernelspecs"])) == ("sandbox", {"sandbox", "python3"})
        model = found["kernelspecs"]["sandbox"]
        assert await ask(api, "GET", "/api/kernelspecs/sandbox") == model
        assert set(model["spec"]) >= {"argv", "env", "display_name", "language", "interrupt_mode", "metadata"}
        assert (model["spec"]["language"], model["spec"]["metadata"]) == ("python", {"debugger": True})
        logo = await api.call("GET", model["resources"]["logo-svg"])
        assert (logo.code, logo.headers["Content-Type"]) == (200, "image/svg+xml")
        assert logo.body.startswith(b"<svg")
        etag = {"If-None-Match": logo.headers["Etag"]}
        assert (await api.call("GET", model["resources"]["logo-svg"], headers=etag)).code == 304
        assert (await api.call("HEAD", model["resources"]["logo-svg"])).code == 200


async def test_me_says_what_the_owner_may_do() -> None:
    async with served() as api:
        wanted = json.dumps({"kernels": ["execute", "fly"], "contents": ["read"]})
        me = await ask(api, "GET", f"/api/me?permissions={wanted}".replace(" ", "%20").replace('"', "%22"))
        assert me["identity"]["username"] == "main"
        assert me["permissions"] == {"kernels": ["execute"], "contents": [], "updatable_fields": []}
        for wrong in ("[]", "%7B", "%FF", '{"a":1}'.replace('"', "%22")):
            await ask(api, "GET", f"/api/me?permissions={wrong}", status=400)


async def test_status_is_the_caller_s_own() -> None:
    async with served() as api:
        before = await ask(api, "GET", "/api/status")
        assert set(before) == {"started", "last_activity", "connections", "kernels"}
        assert before["started"] == before["last_activity"]
        await ask(api, "GET", "/api/kernels?no_track_activity=1")
        assert await ask(api, "GET", "/api/status") == before
        await start_kernel(api)
        after = await ask(api, "GET", "/api/status")
        assert after["kernels"] == 1 and after["last_activity"] > before["last_activity"]
        assert await ask(api, "GET", "/api/status", key=OTHER_KEY) == before


async def test_only_the_version_is_open_and_a_stranger_gets_403() -> None:
    async with served() as api:
        assert set(await ask(api, "GET", "/api", key="")) == {"version"}
        for path in ("status", "me", "spec.yaml", "kernelspecs", "kernelspecs/sandbox", "kernels", "sessions"):
            response = await api.call("GET", f"/api/{path}", key="")
            assert (response.code, json.loads(response.body)["reason"]) == (403, "Forbidden")
        for path in ("/api/kernels", "/api/sessions", f"/api/kernels/{NOWHERE}/restart"):
            assert (await api.call("POST", path, NOTEBOOK, key="wrong-key-x")).code == 403
        assert api.pool.made == []


async def test_tokens_come_in_headers_or_the_query_and_never_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with served() as api:
        for headers in ({"Authorization": f"token {KEY}"}, {"Authorization": f"Bearer {KEY}"}):
            assert (await api.call("GET", "/api/kernels", key="", headers=headers)).code == 200
        spelt = "".join(f"%{ord(letter):02x}" for letter in KEY)
        for query in (f"token={KEY}", f"a=1&%74oken={spelt}", f"token={KEY}&token=x"):
            assert (await api.call("POST", f"/api/kernels?{query}", {}, key="")).code == 201
        # The body of one whose only key is in the query counts, too; in the other families it is no key.
        assert (await api.call("POST", f"/api/kernels?token={KEY}", {"name": "julia"}, key="")).code == 400
        assert (await api.call("GET", f"/api/v1/sessions?token={KEY}", key="")).code == 401
        api.pool.error = ValueError("broken")
        assert (await api.call("POST", f"/api/kernels?token={KEY}", {}, key="")).code == 500
        assert (await api.call("GET", f"/api/me?token={KEY}&permissions=%FF", key="")).code == 400
        assert spelt not in caplog.text and KEY not in caplog.text
        assert "/api/kernels?token=[hidden]" in caplog.text and "broken" in caplog.text


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("/api", "/api"),
        ("/a?token=x&b=1", "/a?token=[hidden]&b=1"),
        ("/a?b=1;ToKeN=x=y", "/a?b=1;ToKeN=[hidden]"),
        ("/a?api_key=x&token&=&", "/a?api_key=[hidden]&token&=&"),
        ("/a?%2574oken=x", "/a?%2574oken=x"),
        ("/a?x=1?token=y", "/a?x=1?token=y"),
        ("/a%3Ftoken=x&b=1", "/a%3Ftoken=[hidden]&b=1"),
        ("/a#token=x", "/a#token=[hidden]"),
        (None, ""),
    ],
)
def test_only_what_may_be_secret_is_hidden(uri: str | None, shown: str) -> None:
    assert shown_uri(uri) == shown


def cors_of(response: HTTPResponse) -> dict[str, str]:
    found = {name.rpartition("-")[2]: value for name, value in response.headers.items() if name.startswith("Access-")}
    return {name: value for name, value in found.items() if name in ("Origin", "Credentials")}


PAGE = {"Origin": "https://page.example"}


async def test_any_page_that_knows_a_token_may_call_where_nothing_else_is_configured() -> None:
    async with served() as api:
        allowed = {"Origin": "https://page.example"}
        assert cors_of(await api.call("GET", "/api/kernels", headers=PAGE)) == allowed
        refused = await api.call("POST", "/api/kernels", {"name": "julia"}, headers=PAGE)
        assert (refused.code, cors_of(refused)) == (400, allowed), "a page sees what is wrong, too"
        assert cors_of(await api.call("GET", "/api/kernels", headers=PAGE, key="")) == {}
        asked = await api.call("OPTIONS", "/api/kernels", headers=PAGE, key="")
        assert (asked.code, cors_of(asked)) == (204, allowed)
        assert "authorization" in asked.headers["Access-Control-Allow-Headers"]
        assert "PATCH" in asked.headers["Access-Control-Allow-Methods"]
        assert cors_of(await api.call("GET", "/api/kernels")) == {}


@pytest.mark.parametrize(
    ("policy", "origin", "allowed"),
    [
        (CorsPolicy("*"), "https://page.example", "*"),
        (CorsPolicy("https://page.example"), "https://page.example", "https://page.example"),
        (CorsPolicy("https://page.example"), "https://page.example.org", None),
        (CorsPolicy("https://page.example"), "null", None),
        (CorsPolicy("https://page.example"), "http://[", None),
        (CorsPolicy("", re.compile(r"https://.*\.example")), "https://page.example", "https://page.example"),
        (CorsPolicy("", re.compile(r"https://page")), "https://page.example", None),
    ],
)
async def test_where_origins_are_configured_the_others_are_refused(
    policy: CorsPolicy, origin: str, allowed: str | None
) -> None:
    async with served(cors=policy) as api:
        response = await api.call("POST", "/api/kernels", {}, headers={"Origin": origin})
        if allowed is not None:
            assert (response.code, cors_of(response)) == (201, {"Origin": allowed})
        else:
            assert response.code == 403 and api.pool.made == []
            assert cors_of(response).get("Origin") != origin
        # Who is no page of another origin has nothing to do with that.
        same = {"Origin": f"http://127.0.0.1:{api.port}"}
        assert (await api.call("GET", "/api/kernels", headers=same)).code == 200
        assert (await api.call("GET", "/api/kernels")).code == 200


async def test_credentials_are_said_where_configured() -> None:
    async with served(cors=CorsPolicy(allow_credentials=True)) as api:
        assert cors_of(await api.call("GET", "/api/kernels", headers=PAGE))["Credentials"] == "true"


async def test_the_document_is_yaml_and_knows_every_route() -> None:
    async with served() as api:
        response = await api.call("GET", "/api/spec.yaml")
        assert response.headers["Content-Type"] == "text/x-yaml"
        document = yaml.safe_load(response.body)
        assert document["openapi"] == "3.1.0"
        for path, verbs in document["paths"].items():
            filled = path.replace("{name}", "sandbox").replace("{file}", "logo-svg.svg")
            filled = re.sub(r"\{\w+\}", NOWHERE, filled)
            for verb, operation in verbs.items():
                answer = await api.call(verb.upper(), filled, {})
                assert str(answer.code) in operation["responses"], (verb, path, answer.code)
            others = {"GET", "POST", "PATCH", "DELETE"} - {verb.upper() for verb in verbs}
            for verb in others:
                assert (await api.call(verb, filled, {})).code == 405, (verb, path)
