"""Files that are there whole or not at all, and arrays that hold numbers only."""
