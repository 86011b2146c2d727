"""What a recipe may say: strict decoding, files, and the sections that import nothing heavy."""
