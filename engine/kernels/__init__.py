"""Operations with their reference, and fused versions where they are built."""
