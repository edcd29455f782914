"""How vocabularies spell blanks and bytes."""

from __future__ import annotations

SPACE = "\u2581"  # SentencePiece's blank
# The letters that byte-level tokenizers write bytes with: printable bytes stand for themselves, the others for the letters from
# U+0100 on.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
LETTERS = {chr(byte): byte for byte in PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(byte for byte in range(256) if byte not in PRINTABLE)
}
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}  # SentencePiece's tokens for bytes of characters without a token
