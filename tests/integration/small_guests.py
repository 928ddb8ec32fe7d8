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


def store(address, value):
    return b"\xc7\x05" + struct.pack("<II", address, value & 0xffffffff)  # mov dword [address], value


# Waits for any byte at the serial port.
TYPED = b"\xba\xfd\x03\x00\x00\xec\xa8\x01\x75\x04\xf3\x90\xeb\xf7" + COM1 + b"\xec"


class Virtio:
    """A driver for the virtio device in a place of a machine with --transport mmio (the entropy device is in place 0), as code. What it shares with the device is from `memory` on."""
    QUEUE = 16
    BUFFERS = 0x4000  # behind the rings: a page for each descriptor

    def __init__(self, place, memory, features=0, queue=0):
        self.registers, self.memory, self.queue, self.made = 0xd0000000 + 0x1000 * place, memory, queue, 0
        low = [(0x24, 0), (0x20, features)]
        ring = [value for n in range(3) for value in ((0x80 + 0x10 * n, memory + 0x1000 * n), (0x84 + 0x10 * n, 0))]
        self.begin = b"".join(store(self.registers + offset, value) for offset, value in
                              [(0x70, 0), (0x70, 1), (0x70, 3), (0x24, 1), (0x20, 1), *low, (0x70, 11), (0x30, queue), (0x38, self.QUEUE), *ring, (0x44, 1), (0x70, 15)])

    def request(self, *buffers):
        """Makes one available: of bytes that the device reads, or lengths of what it writes."""
        first, code = self.made % 5 * 3, b""
        for n, data in enumerate(buffers):
            at, last = self.memory + self.BUFFERS + 0x1000 * (first + n), n == len(buffers) - 1
            size = data if isinstance(data, int) else len(data)
            words = b"" if isinstance(data, int) else data.ljust(-(-size // 4) * 4, b"\0")
            code += b"".join(store(at + i, *struct.unpack_from("<I", words, i)) for i in range(0, len(words), 4))
            flags = (not last) | isinstance(data, int) << 1 | (first + n + 1) << 16
            code += b"".join(store(self.memory + 16 * (first + n) + 4 * i, word) for i, word in enumerate((at, 0, size, flags)))
        slot = self.memory + 0x1000 + 4 + 2 * (self.made % self.QUEUE)
        code += b"\x66\xc7\x05" + struct.pack("<IH", slot, first)
        self.made += 1
        return code + b"\x66\xc7\x05" + struct.pack("<IH", self.memory + 0x1002, self.made) + store(self.registers + 0x50, self.queue)

    def wait(self):
        """For all that were made."""
        return b"\x66\x81\x3d" + struct.pack("<IH", self.memory + 0x2002, self.made) + b"\x74\x04\xf3\x90\xeb\xf1"


class Disk(Virtio):
    FLUSH, DISCARD = 4, 11

    def __init__(self, place, memory):
        super().__init__(place, memory, 1 << 9 | 1 << 13)

    def read(self, sector):
        return self.request(struct.pack("<IIQ", 0, 0, sector), 512, 1)

    def write(self, sector, text):
        return self.request(struct.pack("<IIQ", 1, 0, sector), text.ljust(512, b"\0"), 1)

    def flush(self):
        return self.request(struct.pack("<IIQ", self.FLUSH, 0, 0), 1)

    def discard(self, sector, sectors):
        return self.request(struct.pack("<IIQ", self.DISCARD, 0, 0), struct.pack("<QII", sector, sectors, 0), 1)


def write(path, code):
    start = 64 + 2 * 56
    note = struct.pack("<III", 4, 8, 18) + b"Xen\0" + struct.pack("<Q", ENTRY)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, start + len(note), ENTRY, ENTRY, len(code), len(code), 1)
    with open(path, "wb") as file:
        file.write(header + load + struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(note), len(note), 1) + note + code)
    return path
