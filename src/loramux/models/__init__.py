"""Stock transformers models, tokenizers and chat templates, entered by their public doors."""
