/*
 * Writes AML bytes. Invariants: size_bytes <= capacity_bytes; nothing is written after an overflow. Threading: none.
 */
#include "chipset/acpi_priv.h"

#include <assert.h>
#include <string.h>

/* Opcodes (20.3). */
#define AML_ZERO 0x00
#define AML_ONE 0x01
#define AML_NAME 0x08
#define AML_BYTE 0x0A
#define AML_WORD 0x0B
#define AML_DWORD 0x0C
#define AML_STRING 0x0D
#define AML_QWORD 0x0E
#define AML_SCOPE 0x10
#define AML_BUFFER 0x11
#define AML_PACKAGE 0x12
#define AML_EXTENDED 0x5B
#define AML_EXTENDED_DEVICE 0x82
#define AML_DUAL_NAME 0x2E
#define AML_MULTI_NAME 0x2F
#define AML_METHOD 0x14
#define AML_STORE 0x70
#define AML_AND 0x7B
#define AML_NOTIFY 0x86
#define AML_IF 0xA0
#define AML_EXTENDED_REGION 0x80
#define AML_EXTENDED_FIELD 0x81

#define REGION_IO 1
#define FIELD_DWORD_ZEROES 0x43 /* doubleword accesses, bits that are not written become zero */

void aml_raw(struct aml *aml, const void *data, size_t size_bytes)
{
    if (size_bytes > aml->capacity_bytes - aml->size_bytes)
        aml->overflow = true;
    if (aml->overflow)
        return;
    memcpy(aml->bytes + aml->size_bytes, data, size_bytes);
    aml->size_bytes += size_bytes;
}

void aml_byte(struct aml *aml, uint8_t value)
{
    aml_raw(aml, &value, sizeof(value));
}

void aml_u16(struct aml *aml, uint16_t value)
{
    aml_raw(aml, &value, sizeof(value));
}

void aml_u32(struct aml *aml, uint32_t value)
{
    aml_raw(aml, &value, sizeof(value));
}

void aml_u64(struct aml *aml, uint64_t value)
{
    aml_raw(aml, &value, sizeof(value));
}

static void segment(struct aml *aml, const char *name, size_t length)
{
    char padded[4] = {'_', '_', '_', '_'};

    assert(length >= 1 && length <= 4);
    memcpy(padded, name, length);
    aml_raw(aml, padded, sizeof(padded));
}

static void path(struct aml *aml, const char *text)
{
    const char *dot;
    unsigned segments = 1;

    if (*text == '\\') {
        aml_byte(aml, '\\');
        text++;
    }
    for (dot = text; (dot = strchr(dot, '.')); dot++)
        segments++;
    if (segments > 1)
        aml_byte(aml, segments == 2 ? AML_DUAL_NAME : AML_MULTI_NAME);
    if (segments > 2)
        aml_byte(aml, (uint8_t)segments);
    while ((dot = strchr(text, '.'))) {
        segment(aml, text, (size_t)(dot - text));
        text = dot + 1;
    }
    segment(aml, text, strlen(text));
}

static void open_object(struct aml *aml)
{
    assert(aml->depth < AML_DEPTH);
    aml->open[aml->depth++] = aml->size_bytes;
}

/* Puts PkgLength (20.2.4) in front of the body: it counts itself. */
void aml_close(struct aml *aml)
{
    size_t start, length;
    uint8_t encoded[4];
    unsigned bytes = 1;

    assert(aml->depth);
    start = aml->open[--aml->depth];
    length = aml->size_bytes - start;
    while (length + bytes >= (bytes == 1 ? 1u << 6 : 1u << (4 + 8 * (bytes - 1))))
        bytes++;
    length += bytes;
    encoded[0] = bytes == 1 ? (uint8_t)length : (uint8_t)((bytes - 1) << 6 | (length & 0xF));
    for (unsigned i = 1; i < bytes; i++)
        encoded[i] = (uint8_t)(length >> (4 + 8 * (i - 1)));
    aml_raw(aml, encoded, bytes);
    if (aml->overflow)
        return;
    memmove(aml->bytes + start + bytes, aml->bytes + start, length - bytes);
    memcpy(aml->bytes + start, encoded, bytes);
}

void aml_scope(struct aml *aml, const char *name)
{
    aml_byte(aml, AML_SCOPE);
    open_object(aml);
    path(aml, name);
}

void aml_device(struct aml *aml, const char *name)
{
    aml_byte(aml, AML_EXTENDED);
    aml_byte(aml, AML_EXTENDED_DEVICE);
    open_object(aml);
    path(aml, name);
}

void aml_method(struct aml *aml, const char *name, unsigned arguments)
{
    aml_byte(aml, AML_METHOD);
    open_object(aml);
    path(aml, name);
    aml_byte(aml, (uint8_t)(arguments | 8)); /* serialized */
}

void aml_reference(struct aml *aml, const char *name)
{
    path(aml, name);
}

void aml_port_region(struct aml *aml, const char *name, uint16_t port, uint8_t length_bytes)
{
    aml_byte(aml, AML_EXTENDED);
    aml_byte(aml, AML_EXTENDED_REGION);
    path(aml, name);
    aml_byte(aml, REGION_IO);
    aml_integer(aml, port);
    aml_integer(aml, length_bytes);
}

void aml_fields(struct aml *aml, const char *region, const char *const *names, unsigned count)
{
    aml_byte(aml, AML_EXTENDED);
    aml_byte(aml, AML_EXTENDED_FIELD);
    open_object(aml);
    path(aml, region);
    aml_byte(aml, FIELD_DWORD_ZEROES);
    for (unsigned i = 0; i < count; i++) {
        segment(aml, names[i], strlen(names[i]));
        aml_byte(aml, 32); /* bits, as a PkgLength */
    }
    aml_close(aml);
}

void aml_store(struct aml *aml)
{
    aml_byte(aml, AML_STORE);
}

void aml_if(struct aml *aml)
{
    aml_byte(aml, AML_IF);
    open_object(aml);
}

void aml_and(struct aml *aml, uint8_t operand, uint64_t mask)
{
    aml_byte(aml, AML_AND);
    aml_byte(aml, operand);
    aml_integer(aml, mask);
    aml_byte(aml, AML_ZERO); /* no target */
}

void aml_notify(struct aml *aml, const char *device, uint8_t value)
{
    aml_byte(aml, AML_NOTIFY);
    path(aml, device);
    aml_integer(aml, value);
}

void aml_package(struct aml *aml, uint8_t elements)
{
    aml_byte(aml, AML_PACKAGE);
    open_object(aml);
    aml_byte(aml, elements);
}

void aml_name(struct aml *aml, const char *name)
{
    aml_byte(aml, AML_NAME);
    path(aml, name);
}

void aml_integer(struct aml *aml, uint64_t value)
{
    if (value <= 1) {
        aml_byte(aml, value ? AML_ONE : AML_ZERO);
    } else if (value <= UINT8_MAX) {
        aml_byte(aml, AML_BYTE);
        aml_byte(aml, (uint8_t)value);
    } else if (value <= UINT16_MAX) {
        aml_byte(aml, AML_WORD);
        aml_u16(aml, (uint16_t)value);
    } else if (value <= UINT32_MAX) {
        aml_byte(aml, AML_DWORD);
        aml_u32(aml, (uint32_t)value);
    } else {
        aml_byte(aml, AML_QWORD);
        aml_u64(aml, value);
    }
}

void aml_string(struct aml *aml, const char *text)
{
    aml_byte(aml, AML_STRING);
    aml_raw(aml, text, strlen(text) + 1);
}

/* Three letters of five bits and four hexadecimal digits, most significant byte first (6.1.5, EISAID). */
void aml_eisa_id(struct aml *aml, const char id[7])
{
    uint32_t value = 0;

    for (unsigned i = 0; i < 3; i++)
        value = value << 5 | ((uint32_t)(id[i] - 'A' + 1) & 0x1F);
    for (unsigned i = 3; i < 7; i++)
        value = value << 4 | (uint32_t)(id[i] <= '9' ? id[i] - '0' : id[i] - 'A' + 10);
    aml_byte(aml, AML_DWORD);
    aml_u32(aml, __builtin_bswap32(value));
}

void aml_resources(struct aml *aml)
{
    aml_name(aml, "_CRS");
    aml_byte(aml, AML_BUFFER);
    open_object(aml);
}

/* A buffer starts with its size as an object, known only now. */
void aml_resources_end(struct aml *aml)
{
    size_t start = aml->open[aml->depth - 1], length, prefix;

    aml_byte(aml, 0x79); /* end tag; a zero checksum is taken as right */
    aml_byte(aml, 0);
    length = aml->size_bytes - start;
    aml_integer(aml, length);
    prefix = aml->size_bytes - start - length;
    if (!aml->overflow) {
        uint8_t encoded[9];

        memcpy(encoded, aml->bytes + start + length, prefix);
        memmove(aml->bytes + start + prefix, aml->bytes + start, length);
        memcpy(aml->bytes + start, encoded, prefix);
    }
    aml_close(aml);
}

void aml_io(struct aml *aml, uint16_t port, uint8_t length_bytes)
{
    aml_byte(aml, 0x47);
    aml_byte(aml, 1); /* all 16 bits are decoded */
    aml_u16(aml, port);
    aml_u16(aml, port);
    aml_byte(aml, 1);
    aml_byte(aml, length_bytes);
}

void aml_irq(struct aml *aml, unsigned irq)
{
    aml_byte(aml, 0x22);
    aml_u16(aml, (uint16_t)(1u << irq));
}

/* Extended interrupt descriptor (6.4.3.6). */
void aml_gsi(struct aml *aml, uint32_t gsi)
{
    aml_byte(aml, 0x89);
    aml_u16(aml, 6);
    aml_byte(aml, 0x09); /* consumed, level, high, shared */
    aml_byte(aml, 1);
    aml_u32(aml, gsi);
}

void aml_memory32_fixed(struct aml *aml, uint32_t base, uint32_t length_bytes)
{
    aml_byte(aml, 0x86);
    aml_u16(aml, 9);
    aml_byte(aml, 1); /* writable */
    aml_u32(aml, base);
    aml_u32(aml, length_bytes);
}

/* Word address space descriptor (6.4.3.5.3): produced, both ends fixed. */
static void word_window(struct aml *aml, uint8_t type, uint8_t type_flags, uint16_t first, uint16_t last)
{
    aml_byte(aml, 0x88);
    aml_u16(aml, 13);
    aml_byte(aml, type);
    aml_byte(aml, 0x0C);
    aml_byte(aml, type_flags);
    aml_u16(aml, 0); /* granularity */
    aml_u16(aml, first);
    aml_u16(aml, last);
    aml_u16(aml, 0); /* translation */
    aml_u16(aml, (uint16_t)(last - first + 1));
}

void aml_bus_window(struct aml *aml, uint16_t first, uint16_t last)
{
    word_window(aml, 2, 0, first, last);
}

void aml_io_window(struct aml *aml, uint16_t first, uint16_t last)
{
    word_window(aml, 1, 3, first, last); /* the entire range, ISA and not */
}

void aml_memory_window(struct aml *aml, uint64_t base, uint64_t length_bytes)
{
    uint64_t last = base + length_bytes - 1;
    bool wide = last > UINT32_MAX;
    uint64_t fields[5] = {0, base, last, 0, length_bytes};

    aml_byte(aml, wide ? 0x8A : 0x87);
    aml_u16(aml, wide ? 43 : 23);
    aml_byte(aml, 0); /* memory */
    aml_byte(aml, 0x0C);
    aml_byte(aml, 1); /* not cacheable, read and write */
    for (unsigned i = 0; i < 5; i++) {
        if (wide)
            aml_u64(aml, fields[i]);
        else
            aml_u32(aml, (uint32_t)fields[i]);
    }
}
