"""A tiny bilingual tokenizer, trained on the spot, for tests that need real ids."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from storage.tokenizer import SPECIAL_TOKENS, ChatTokenizer, write_tokenizer

TEXTS = (
    "The cat is red. The dog is blue. What does the horse eat? It eats rice and honey.",
    "猫是红色的。狗是蓝色的。马吃什么？马吃米饭和蜂蜜。",
    "system user assistant\n",
)


def tiny_tokenizer(folder: Path, vocabulary: int = 400) -> ChatTokenizer:
    """Train a byte-level BPE on a few sentences and write it into `folder`."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS * 20, trainer)
    write_tokenizer(folder, model, "gpt-2")
    return ChatTokenizer(folder)
