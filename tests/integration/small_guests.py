"""Guests of a few instructions: ELF files with a PVH note, entered in 32-bit protected mode. For tests and benchmarks that need many machines or machines at once."""
import struct

ENTRY = 0x100000
COM1 = b"\xba\xf8\x03\x00\x00"  # mov edx, 0x3f8
HALT = b"\xfa\xf4\xeb\xfd"      # cli; hlt; jmp to the hlt
SPIN = b"\xeb\xfe"
# Waits for a byte at the serial port and sends it back.
ECHO = b"\xba\xfd\x03\x00\x00\xec\xa8\x01\x75\x04\xf3\x90\xeb\xf7" + COM1 + b"\xec\xee\xeb\xe9"
# S5: SLP_TYP and SLP_EN to the PM1 control port, 0x604.
POWER_OFF = b"\xba\x04\x06\x00\x00\xb8\x00\x34\x00\x00\x66\xef\xf4"
# Polls PM1 status (0x600) for PWRBTN_STS and powers off.
UNTIL_BUTTON = b"\xba\x00\x06\x00\x00\x66\xed\xf6\xc4\x01\x75\x04\xf3\x90\xeb\xf6" + POWER_OFF
TRIPLE_FAULT = b"\x0f\x01\x1d\x00\x00\x00\x00\x0f\x0b"  # lidt of zeroes; ud2
PANIC = b"\xba\x05\x05\x00\x00\xb0\x01\xee\xf4"         # pvpanic: port 0x505


def say(text):
    return COM1 + b"".join(bytes((0xB0, byte, 0xEE)) for byte in text.encode())


def write(path, code):
    start = 64 + 2 * 56
    note = struct.pack("<III", 4, 8, 18) + b"Xen\0" + struct.pack("<Q", ENTRY)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, start + len(note), ENTRY, ENTRY, len(code), len(code), 1)
    with open(path, "wb") as file:
        file.write(header + load + struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(note), len(note), 1) + note + code)
    return path
