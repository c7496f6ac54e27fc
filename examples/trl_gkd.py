"""On-policy distillation by TRL's GKDTrainer, with fastkd's losses: the import is the line that changes.

It runs as it is, on small random models. On real ones, with what `pip install '.[train,trl]'` installs:

    python examples/trl_gkd.py --teacher Qwen/Qwen2.5-1.5B-Instruct --student Qwen/Qwen2.5-0.5B-Instruct --lr 1e-5
"""

from __future__ import annotations

import tempfile

import torch
from common import Losses, flags, load, texts, tokenizer
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastkd.integrations.trl import GKDConfig, GKDTrainer  # was: from trl.experimental.gkd import ...

args = flags(__doc__, steps=30)
if args.teacher is not None:
    tokens = tokenizer(args)
else:  # one of bytes, of the kind that TRL wants, for the small models
    bytes_of = {letter: i + 2 for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    raw = Tokenizer(models.BPE({"<pad>": 0, "</s>": 1, **bytes_of}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", padding_side="left")
    tokens.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
small = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
small |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
student = load(AutoModelForCausalLM, args.student, "qwen2", hidden_size=64, intermediate_size=128, **small)
teacher = load(AutoModelForCausalLM, args.teacher, "qwen2", hidden_size=128, intermediate_size=256, **small)


def chat(text: str) -> list[dict[str, str]]:
    """What is asked, and what there is to answer: the halves of a text."""
    half = len(text[:120]) // 2
    return [{"role": "user", "content": text[:half]}, {"role": "assistant", "content": text[half : 2 * half]}]


with tempfile.TemporaryDirectory() as folder:
    config = GKDConfig(
        folder,
        beta=0.5,  # the divergence of Jensen and Shannon
        lmbda=0.25,  # of the steps, those on the student's own answers
        max_length=256,
        max_new_tokens=16,
        max_steps=args.steps,
        per_device_train_batch_size=4,
        learning_rate=args.lr,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        disable_tqdm=True,
    )
    trainer = GKDTrainer(
        student,
        teacher,
        config,
        train_dataset=Dataset.from_list([{"messages": chat(text)} for text in texts(args)[:256]]),
        processing_class=tokens,
    )
    trainer.train()

losses = Losses(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
losses.finish()
