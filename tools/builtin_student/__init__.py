"""How the built-in student was made: warm_up (start here), its dialogues, its tokenizer."""
