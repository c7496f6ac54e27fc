"""Names on the hub and names of folders: what is mistyped is answered at once, and a hub that is not there quickly."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi

from fastkd.train.common import hub
from fastkd.train.common.errors import InputError
from fastkd.train.data.sources import hub_revision, read_hub
from fastkd.train.models.loading import load_config


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
