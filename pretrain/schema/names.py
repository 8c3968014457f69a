"""Names from earlier versions. YAML and overrides refuse them with the current name; saved files are translated."""

RENAMED = {
    "objective": "task",
    "data.vocabulary": "data.text_tokenizer",
    "data.tokenizer": "data.image_tokenizer",
}
"""Old name -> new, for sections, their fields, and fingerprints (which are named after their field)."""
