"""Text for the models: found, checked, tokenised once, memory-mapped.

    from data import load_text
    text = load_text("tinyshakespeare", tokenizer="char", vocab_size=0)
    text.train, text.val, text.tokenizer.decode(text.val[:100])

Images are found and prepared in the same way: data/images.py; data/augment.py changes them at random.
"""

from data.text import TextData, load_text

__all__ = ["TextData", "load_text"]
