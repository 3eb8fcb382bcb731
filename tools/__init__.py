"""Published data sets as JSONL files, and plans and grades by a multimodal language model."""
