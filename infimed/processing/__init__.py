"""Text and pixels to numbers: tokenizer, chat renderer, image and DICOM decoding. No torch.nn here."""
