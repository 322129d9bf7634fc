"""How the built-in student was made: warm_up (start here), the dialogues it learns from, its tokenizer."""
