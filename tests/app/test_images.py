"""Images over HTTP, on a real server with a real vLLM and a tiny model that looks at them. Needs torchvision."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from benchmarks.servers import serving
from benchmarks.zoo.calibrated import calibrated

pytest.importorskip("vllm")
pytest.importorskip("torchvision")
pytestmark = pytest.mark.model

TEXT = {"type": "text", "text": "Tell me of the sea."}
SETTINGS = {
    "CANDOR_EAGER": "true",
    "CANDOR_KV_CACHE_BYTES": str(1 << 27),
    "CANDOR_MAX_MODEL_LEN": "1024",
    "CANDOR_VLLM": """--limit-mm-per-prompt '{"image": 2}'""",
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    model, bundle = calibrated(tmp_path_factory.mktemp("seeing"), sees=True)
    with serving(model, bundle, SETTINGS) as server, httpx.Client(base_url=server.url, timeout=120) as client:
        yield client


def data(shown: str | bytes, size: tuple[int, int] = (84, 84)) -> str:
    """shown: a color, or each pixel's."""
    from PIL import Image

    file = io.BytesIO()
    made = Image.new("RGB", size, shown) if isinstance(shown, str) else Image.frombytes("RGB", size, shown)
    made.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def image(url: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}, **more}


def ask(client: httpx.Client, *parts: dict[str, Any], **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": list(parts)}], "max_tokens": 16, **more}
    return client.post("/v1/chat/completions", json=body)


def test_the_model_looks_at_them_and_its_answer_is_judged(client: httpx.Client) -> None:
    red, blue, again = (ask(client, image(data(color)), TEXT).json() for color in ("red", "blue", "red"))
    said = [one["choices"][0]["message"]["content"] for one in (red, blue, again)]
    assert said[0] == said[2] != said[1]
    assert red["usage"]["prompt_tokens"] > ask(client, TEXT).json()["usage"]["prompt_tokens"]
    verdicts = [one["reliability"]["results"][0] for one in (red, blue, again)]
    assert not any(one["calibrated"] for one in verdicts)
    assert all(one["probability"] is not None for one in verdicts)
    assert verdicts[0]["probability"] == pytest.approx(verdicts[2]["probability"], abs=1e-4)


def test_nothing_of_a_withheld_answer_leaves(client: httpx.Client) -> None:
    for stream in (False, True):
        said = ask(client, image(data("red")), TEXT, stream=stream, reliability={"mode": "abstain"}).text
        pieces = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: {")]
        found = pieces if stream else [json.loads(said)]
        for piece in found:
            for choice in piece["choices"]:
                assert not (choice.get("message") or choice.get("delta") or {}).get("content")
        assert found[-1]["reliability"]["results"][0]["abstained"]


def test_the_other_apis_take_them_too(client: httpx.Client) -> None:
    given = [{"type": "input_text", "text": "Tell me."}, {"type": "input_image", "image_url": data("red")}]
    responses = {"input": [{"role": "user", "content": given}], "max_output_tokens": 16}
    source = {"type": "base64", "media_type": "image/png", "data": data("red").split(",")[1]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": "Tell me."}]
    messages = {"model": "bundle", "max_tokens": 16, "messages": [{"role": "user", "content": content}]}
    for path, body in (("/v1/responses", responses), ("/v1/messages", messages)):
        answered = client.post(path, json=body)
        assert answered.status_code == 200, answered.text
        assert answered.json()["reliability"]["results"][0]["calibrated"] is False
        assert answered.json()["usage"]["input_tokens"] > 15


@pytest.mark.parametrize(
    ("part", "why"),
    [
        (image("http://127.0.0.1:9/a.png"), "this server fetches none"),
        (image("file:///etc/passwd"), "this server fetches none"),
        ({"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}}, "fetches none"),
        (image(data("red"), uuid="another's"), "got a name of one"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "images alone are"),
        ({"type": "image_embeds", "image_embeds": "AAAA"}, "images alone are"),
        (image("data:image/png;base64,AAAA"), "cannot identify image"),
        (image(data("white", (9000, 9000))), "exceed the maximum of 33554432 pixels"),
    ],
)
def test_what_is_not_shown_is_a_400(client: httpx.Client, part: dict[str, Any], why: str) -> None:
    refused = ask(client, part, TEXT)
    assert refused.status_code == 400
    assert why in refused.json()["error"]["message"]


def test_a_photograph_is_no_long_text(client: httpx.Client) -> None:
    drawn = random.Random(0).randbytes(3 * 200 * 200)  # compresses to nothing less
    assert ask(client, image(data(drawn, (200, 200))), TEXT).status_code == 200


def test_beams_are_not_written_over_images(client: httpx.Client) -> None:
    refused = ask(client, image(data("red")), TEXT, use_beam_search=True, n=2)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "use_beam_search"


def test_more_than_the_operator_allows_are_a_400(client: httpx.Client) -> None:
    refused = ask(client, *[image(data("red"))] * 3, TEXT)
    assert refused.status_code == 400
    assert "At most 2 image(s)" in refused.json()["error"]["message"]
