"""Names on the hub and names of folders: what is mistyped is answered at once, and a hub that is not there quickly."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from huggingface_hub import HfApi

from fastkd.train.common import hub
from fastkd.train.common.errors import InputError
from fastkd.train.data.sources import hub_revision, read_hub
from fastkd.train.models.loading import load_config
from tests.forks import Forks


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("models/wohle", "; did you mean models/whole?"),
        ("model/whole", "; did you mean models/whole?"),
        ("./models/whole2", "; did you mean models/whole?"),
        ("models/x/y", ""),
        ("nothing like it", ""),
        ("models/whole/model.safetensors", ", which is a file"),
    ],
)
def test_a_mistyped_folder_of_a_model_asks_nobody(
    name: str, hint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models", "whole").mkdir(parents=True)
    Path("models", "whole", "model.safetensors").touch()
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    if name == "model/whole":  # it may be on the hub
        monkeypatch.setattr(hub, "_answers", lambda *_: False)
    with pytest.raises(InputError, match=f"^no teacher folder {re.escape(name)}{re.escape(hint)}"):
        load_config(name, "teacher")


def test_a_hub_that_does_not_answer_is_asked_for_a_model_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(self: HfApi, name: str, **_: Any) -> None:
        asked.append(name)
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    for _ in range(2):
        with pytest.raises(InputError, match="no such model from the hub: it does not answer"):
            load_config("nobody/knows-this", "teacher")
    assert asked == ["nobody/knows-this"]


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((args, kwargs))
        if kwargs["split"] == "dev":
            raise ValueError("unknown split\n'dev'")
        return datasets.Dataset.from_dict({"text": ["x"]})

    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(read_hub("glue", "sst2", "train", cache_dir=tmp_path)) == [{"text": "x"}]
    assert asked == [(("glue", "sst2"), {"split": "train", "cache_dir": str(tmp_path), "streaming": False})]
    with pytest.raises(InputError, match=r"^cannot load the data glue of the hub: unknown split 'dev'$"):
        read_hub("glue", "sst2", "dev", cache_dir=tmp_path)


@pytest.mark.parametrize("name", ["words/trian", "./words/trian", "/nowhere/trian", "~/trian", "a/b/c"])
def test_a_mistyped_folder_asks_nobody(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("words", "train").mkdir(parents=True)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: pytest.fail("asked the hub"))
    hint = r"; did you mean words/train\?" if "words" in name else ""
    for read in (hub_revision, partial(read_hub, split="train")):
        with pytest.raises(InputError, match=f"^no data folder {name}{hint}$"):
            read(name, config=None, cache_dir=tmp_path)


def test_a_hub_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By datasets as by us: it finds what it may have in its cache, and nobody waits for what it would repeat."""
    asked: list[str] = []

    def unreachable(self: HfApi, name: str, **_: Any) -> None:
        asked.append(name)
        raise OSError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(HfApi, "hf_hub_download", unreachable)
    before = datasets.config.HF_HUB_OFFLINE
    message = (
        "^no data folder nobody/words, and no such dataset from the hub: it does not answer, and nothing of that name"
    )
    for read in (hub_revision, partial(read_hub, split="train")):
        with pytest.raises(InputError, match=message):
            read("nobody/words", config=None, cache_dir=tmp_path)
    assert asked == ["nobody/words"] and datasets.config.HF_HUB_OFFLINE is before


class Hub(BaseHTTPRequestHandler):
    """A hub of folders, root/models/OWNER/NAME and root/datasets/OWNER/NAME, whose only revision goes by contents."""

    root: Path

    def log_message(self, *_: Any) -> None: ...

    def answer(self) -> None:
        at = self.path.partition("?")[0].strip("/").split("/")
        is_api, kind = at[0] == "api", "datasets" if "datasets" in at[:2] else "models"
        at = [part for part in at if part not in ("api", "models", "datasets")]
        folder, rest = self.root / kind / "/".join(at[:2]), at[2:]
        files = sorted(folder.glob("*"))
        entries = [{"type": "file", "path": f.name, "oid": "1" * 40, "size": f.stat().st_size} for f in files]
        sha = hashlib.sha1(b"".join(file.read_bytes() for file in files)).hexdigest()
        headers, body = {"X-Repo-Commit": sha}, b""
        if not files:
            headers["X-Error-Code"] = "RepoNotFound"
        elif is_api and rest[:1] in ([], ["revision"]):
            body = json.dumps({"id": "/".join(at[:2]), "sha": sha, "siblings": []}).encode()
        elif is_api and rest[0] == "tree":
            body = json.dumps(entries).encode()
        elif rest[0] == "resolve" and (folder / rest[-1]).is_file():
            body = (folder / rest[-1]).read_bytes()
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        else:
            headers["X-Error-Code"] = "EntryNotFound"
        self.send_response(200 if body else 404)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = answer


READ = """
import json, sys
from pathlib import Path
from fastkd.train.data.sources import hub_revision, read_hub
from fastkd.train.models.loading import load_model
model, cache = load_model("someone/t5", "teacher")[0], Path(sys.argv[1])
made = [float(model.shared.weight.detach().double().sum()), hub_revision("someone/words", None, cache_dir=cache)]
made.append([row["text"] for row in read_hub("someone/words", None, "train", cache_dir=cache)])
for load in (lambda: load_model("someone/none", "teacher"), lambda: hub_revision("someone/no", None, cache_dir=cache)):
    try:
        load()
    except Exception as error:
        made.append(f"{type(error).__name__}: {error}")
print(json.dumps(made))
"""


@pytest.mark.long
def test_libraries_and_a_hub(tiny: Callable[..., Any], saved: Callable[..., Path], tmp_path: Path) -> None:
    """Models of nothing but .bin files, data that changes, and what is left of both when the hub is gone."""
    model, words = tiny(), tmp_path / "datasets" / "someone" / "words" / "train.jsonl"
    folder = saved(model, tmp_path / "models" / "someone" / "t5")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    words.parent.mkdir(parents=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Folders", (Hub,), {"root": tmp_path}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (tmp_path / "read.py").write_text(READ, encoding="utf-8")
    forks = Forks(
        "fastkd.train.data.sources",
        "fastkd.train.models.loading",
        "transformers.models.t5.modeling_t5",
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
        HF_HOME=f"{tmp_path}/home",
        NO_PROXY="127.0.0.1",
        HF_HUB_OFFLINE="0",
    )

    def read() -> Any:
        done = forks.run(tmp_path / "read.py", tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    every = []
    for text in ("one", "two", "two"):
        words.write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
        every.append(read())
    server.shutdown()
    server.server_close()
    every.append(read())
    forks.end()
    weights = float(model.shared.weight.detach().double().sum())
    assert [(row[0], row[2]) for row in every] == [(weights, [text]) for text in ("one", "two", "two", "two")]
    assert len({row[1] for row in every}) == 2 and every[1][1] == every[2][1] == every[3][1]
    for row, reason in zip(every, [*3 * ["it has none of that name, or"], "it does not answer"], strict=True):
        for said, what in zip(row[3:], ("teacher folder someone/none", "data folder someone/no"), strict=True):
            assert said.startswith(f"InputError: no {what}, and no such ") and f" from the hub: {reason}" in said
