"""Captions for the photographs that came without text.

caption.py loads a vision-language model, asks it about pictures in batches, and frees it again.
text.py holds the questions, and the rules that make a sound caption of any answer; it needs no model.
Nothing here knows of the trainer: pictures come in as paths with a reader, captions go out as values.
"""
