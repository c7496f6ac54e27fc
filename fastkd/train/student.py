"""T5 models of a given size, and teachers from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import InputError

HEAD_WIDTH = 32


def t5_config(vocabulary_size: int, d_model: int, layers: int, pad: int = 0, eos: int = 1) -> Any:
    """Return the `T5Config` of a model `d_model` wide with `layers` encoder and as many decoder layers.

    There are d_model // 32 heads (at least 1), 32 wide each; the feed-forward layer is 4 times d_model wide. The head
    is tied and the decoder's output scaled, as in T5 v1.0: an untied head starts at standard deviation 1 in
    transformers, and a small model wastes hundreds of steps on a first loss far above ln V.
    No dropout, as in T5 v1.1's pre-training.
    """
    from transformers import T5Config

    start: dict[str, Any] = {"decoder_start_token_id": pad}  # not a declared field of T5Config
    return T5Config(
        vocab_size=vocabulary_size,
        d_model=d_model,
        d_kv=HEAD_WIDTH,
        num_heads=max(d_model // HEAD_WIDTH, 1),
        d_ff=4 * d_model,
        num_layers=layers,
        num_decoder_layers=layers,
        dropout_rate=0.0,
        pad_token_id=pad,
        eos_token_id=eos,
        **start,
    )


def new_model(config: Any, seed: int) -> Any:
    """Return a `T5ForConditionalGeneration` with random weights that depend on (config, seed) alone."""
    from transformers import T5ForConditionalGeneration, set_seed

    set_seed(seed)
    model = T5ForConditionalGeneration(config)
    model.generation_config.max_new_tokens = 64
    return model


def load_teacher(folder: str | Path) -> tuple[Any, Any]:
    """Return (model, tokenizer) of a `save_pretrained` folder; nothing is downloaded.

    Raises InputError if the folder is missing, does not hold a T5, or lacks a part.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoTokenizer, T5ForConditionalGeneration

    if not Path(folder).is_dir():
        raise InputError(f"no teacher folder {folder}")
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"teacher folder {folder} has no config.json: expected a save_pretrained folder of a T5")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if config.model_type != "t5":
            raise InputError(f"teacher folder {folder} holds a {config.model_type!r} model: expected a T5")
        model = T5ForConditionalGeneration.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"cannot load the teacher in {folder}: {str(error).splitlines()[0]}") from error
    return model, tokenizer
