"""Names of earlier versions: refused in YAML and overrides with the present ones, translated in what was saved."""

RENAMED = {
    "objective": "task",
    "data.vocabulary": "data.text_tokenizer",
    "data.tokenizer": "data.image_tokenizer",
}
"""Old name -> new, of sections, of fields in them, and of fingerprints, which have the name of their field."""
