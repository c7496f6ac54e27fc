"""Tiny models and tokenizers of every family that fastkd-train knows, folders of both, and batches for them."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

from fastkd.train.common.family import KINDS, family_of, is_enct5
from fastkd.train.models.tokenizer import train_tokenizer

VOCABULARY, WIDTH, HEADS = 96, 32, 4
_BERT = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS, "intermediate_size": 64}
_BART = {
    "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "scale_embedding": True,
}  # fmt: skip
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_T5 = {"d_model": WIDTH, "d_kv": 8, "num_heads": HEADS, "d_ff": 64, "num_layers": 2, "decoder_start_token_id": 0}
# model_type -> the settings of a small one
SETTINGS: dict[str, dict[str, Any]] = {
    "t5": _T5,
    "mt5": {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": _BART,
    "mbart": _BART,
    "marian": {**_BART, "decoder_start_token_id": 1},
    "pegasus": _BART,
    "bert": {**_BERT, "max_position_embeddings": 64},
    "roberta": {**_BERT, "max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {"dim": WIDTH, "n_layers": 2, "n_heads": HEADS, "hidden_dim": 64, "max_position_embeddings": 64},
    "gpt2": {"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 1},
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "mistral": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": {**_LLAMA, "final_logit_softcapping": 3.0},
    "gemma3_text": _LLAMA,
}
_NO_DROPOUT = ("dropout", "dropout_rate", "hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout",
               "activation_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop", "classifier_dropout",
               "seq_classif_dropout")  # fmt: skip


def config(model_type: str, **changes: Any) -> Any:
    """The config of a tiny model of a type, without dropout; `changes` by the names of its own fields."""
    made = transformers.CONFIG_MAPPING[model_type](**{"vocab_size": VOCABULARY, **SETTINGS[model_type], **changes})
    for name in _NO_DROPOUT:
        if hasattr(made, name):
            setattr(made, name, 0.0)
    return made


def model(model_type: str, kind: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A tiny model of a type, by default of its family's first kind, with weights that are not too small to matter."""
    torch.manual_seed(seed)
    made_config = config(model_type, **changes)
    kind = kind or family_of(made_config).kinds[0]
    made = getattr(transformers, KINDS[kind].auto).from_config(made_config).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:  # biases that start at 0 would be forgotten without a difference
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" not in name and "wte" not in name and "shared" not in name:
                parameter.mul_(3)
        if hasattr(made, "final_logits_bias"):
            made.final_logits_bias.normal_()
    return made


def batch(kind: str, seed: int = 0, rows: int = 3, length: int = 11, classes: int = 2) -> dict[str, torch.Tensor]:
    """A batch for a model of a kind, as the trainer's collators make them: padded on the right, two rows shorter."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCABULARY, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:, -3:] = 0
    made = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}
    if kind == "classifier":
        return {**made, "labels": torch.randint(classes, (rows, 1), generator=generator)}
    if kind == "seq2seq":
        labels = torch.randint(5, VOCABULARY, (rows, length - 4), generator=generator)
        labels[0, -2:] = -100
        return {**made, "labels": labels}
    labels = ids.masked_fill(mask == 0, -100)
    if kind == "causal":  # a prompt is not learnt
        labels[:, :3] = -100
        return {**made, "labels": labels}
    is_masked = torch.rand(ids.shape, generator=generator) < 0.4
    is_masked[:, 1] = True
    return {**made, "labels": labels.masked_fill(~is_masked, -100)}


def is_classifier(made: Any) -> bool:
    """Whether a model tells classes apart."""
    return is_enct5(made.config) or type(made).__name__.endswith("ForSequenceClassification")


# Tokenizers ----------------------------------------------------------------------------------------------------------

TEXTS = (
    "A bus is leaving the old station at nine, and a letter lies on the table.",
    "Nobody knows why the river was green; the children say that a painter lived there.",
    "In summer the days are long, the nights are warm and everything grows in the garden.",
    "She reads the paper, drinks her coffee and writes down what she wants to buy: bread, milk, apples.",
    "The museum shows twelve pictures of ships, which were painted between 1820 and 1875.",
    "Der Bus fährt um neun Uhr vom alten Bahnhof, und auf dem Tisch liegt ein Brief.",
    "Niemand weiß, warum der Fluss grün war; die Kinder sagen, dass dort ein Maler wohnte.",
    "Im Sommer sind die Tage lang, die Nächte warm, und im Garten wächst alles.",
    "Why? The quick brown fox jumps over the lazy dog! Zwölf Boxkämpfer jagen Viktor quer über den Deich.",
    "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z 0 1 2 3 4 5 6 7 8 9 - ( ) ' \" / _",
)
PIECES = 480  # of a vocabulary, at most
CHAT = (  # refuses what it does not know, as those of many models do
    "{% for message in messages %}{% if message.role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message.role) }}{% endif %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _pieces_of(trained: tokenizers.Tokenizer, trainer: Any) -> Any:
    """What a trainer makes of TEXTS: the part "model" of a tokenizer's JSON."""
    trained.train_from_iterator(TEXTS, trainer)
    return json.loads(trained.to_str())["model"]


def _bpe(special: tuple[str, ...], level: Any, alphabet: list[str]) -> dict[str, Any]:
    """Vocabulary and merges of a BPE whose first ids are the special tokens."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = level
    made = _pieces_of(
        trained,
        trainers.BpeTrainer(
            vocab_size=PIECES, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    return {"vocab": made["vocab"], "merges": [tuple(merge) for merge in made["merges"]]}


def _bytes(*special: str) -> dict[str, Any]:
    return _bpe(special, pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.ByteLevel.alphabet())


def _llama(*special: str) -> dict[str, Any]:
    return _bpe((*special, *(f"<0x{i:02X}>" for i in range(256))), pre_tokenizers.Metaspace(), [])


def _wordpiece() -> Any:
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = tokenizers.normalizers.BertNormalizer()
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=PIECES, special_tokens=special, show_progress=False)
    return transformers.BertTokenizer(vocab=_pieces_of(trained, trainer)["vocab"])


def _unigram(*special: str, behind: tuple[str, ...] = ()) -> list[tuple[str, float]]:
    """Pieces with scores: special tokens, what TEXTS hold, special tokens."""
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    pieces = [(piece, score) for piece, score in _pieces_of(trained, trainer)["vocab"] if piece != "<unk>"]
    return [*((name, 0.0) for name in special), *pieces, *((name, 0.0) for name in behind)]


def _mbart() -> Any:
    languages = tuple(transformers.models.mbart.tokenization_mbart.FAIRSEQ_LANGUAGE_CODES)
    return transformers.MBartTokenizer(
        vocab=_unigram("<s>", "<pad>", "</s>", "<unk>", behind=(*languages, "<mask>")),
        src_lang="en_XX",
        tgt_lang="de_DE",
    )


def _marian() -> Any:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=200, hard_vocab_limit=False, minloglevel=2,
        character_coverage=1.0,
    )  # fmt: skip
    spm = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [spm.id_to_piece(i) for i in range(3, spm.get_piece_size())]
    names = ["</s>", "<unk>", *pieces, "<pad>"]  # as in its checkpoints, where padding is last
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("source.spm", "target.spm", "vocab.json")]
        for file in files[:2]:
            file.write_bytes(model.getvalue())
        files[2].write_text(json.dumps({name: i for i, name in enumerate(names)}), encoding="utf-8")
        return transformers.MarianTokenizer(*map(str, files), source_lang="en", target_lang="de")


_ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_CHAT_ENDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TOKENIZERS: dict[str, Any] = {
    "t5": lambda: train_tokenizer(TEXTS, PIECES),
    "bart": lambda: transformers.RobertaTokenizer(**_bytes(*_ROBERTA)),
    "mbart": _mbart,
    "marian": _marian,
    "pegasus": lambda: transformers.PegasusTokenizer(
        vocab=_unigram("<pad>", "</s>", "<mask_1>", "<mask_2>", *(f"<unk_{i}>" for i in range(2, 103)), "<unk>")
    ),
    "bert": _wordpiece,
    "gpt2": lambda: transformers.GPT2Tokenizer(**_bytes("<|endoftext|>")),
    "llama": lambda: transformers.LlamaTokenizer(
        **_llama("<unk>", "<s>", "</s>"), add_bos_token=True, pad_token="<unk>"
    ),
    "qwen2": lambda: transformers.Qwen2Tokenizer(
        **_bytes(*_CHAT_ENDS), eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"], chat_template=CHAT
    ),
    "gemma": lambda: transformers.GemmaTokenizer(**_llama(*_GEMMA), add_bos_token=True),
}
_SAME = {"mt5": "t5", "roberta": "bart", "distilbert": "bert", "qwen3": "qwen2", "mistral": "llama", "gemma2": "gemma",
         "gemma3_text": "gemma"}  # fmt: skip


@functools.cache
def _tokenizer(model_type: str) -> Any:
    return _TOKENIZERS[model_type]()


def tokenizer(model_type: str) -> Any:
    """The tokenizer of a type, trained on TEXTS, shared by all; whoever changes it makes a `new_tokenizer`."""
    return _tokenizer(_SAME.get(model_type, model_type))


def new_tokenizer(model_type: str) -> Any:
    """Another one just like it."""
    return _TOKENIZERS[_SAME.get(model_type, model_type)]()


def fitting(model_type: str) -> dict[str, Any]:
    """What the config of a type says of its tokenizer: the rows of the embedding, and special ids as it counts them."""
    its = tokenizer(model_type)
    size = -(-(max(its.get_vocab().values()) + 1) // 8) * 8
    said = {"vocab_size": size, "eos_token_id": its.eos_token_id, "bos_token_id": its.bos_token_id}
    said["pad_token_id"] = its.eos_token_id if its.pad_token_id is None else its.pad_token_id
    if model_type in ("bart", "mbart"):
        said["decoder_start_token_id"] = its.eos_token_id
    elif model_type in ("marian", "pegasus", "t5", "mt5"):
        said["decoder_start_token_id"] = its.pad_token_id
    return said


def folder(model_type: str, where: Path, kind: str | None = None, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model with its tokenizer, as --teacher and --student take it; return the folder."""
    model(model_type, kind, seed, **{**fitting(model_type), **changes}).save_pretrained(where)
    tokenizer(model_type).save_pretrained(where)
    return where
