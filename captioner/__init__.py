"""Captions for the photographs that came without text.

caption.py loads a vision-language model, asks it about pictures in batches, and frees it again.
questions.py holds what it is asked; text.py the rules that make a sound caption of any answer, or of a user's own text,
with clean.py (what is stripped, rejected, shortened) and words.py (where the trigger word stands). They need no model.
Nothing here knows of the trainer: pictures come in as paths with a reader, captions go out as values.
"""
