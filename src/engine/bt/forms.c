/*
 * What decoding has found out about instructions, by form: the bytes up to ModRM and SIB, which determine all but the values of displacement and immediate.
 *
 * Where the form of the instruction at some bytes ends is found out by looking at no other bytes, so two instructions with the same form are decoded alike. Whether that end is where
 * the decoder saw the first value is checked for whatever is stored.
 * Threading: e->lock.
 */
#include <stdlib.h>
#include <string.h>

#include "engine/bt/translate_priv.h"

#define FORMS 8192u
#define WAYS 2u
#define FORM_BYTES_MAX 11u
#define FORM_HIGH_BYTES 3u

_Static_assert(FORM_BYTES_MAX == 8 + FORM_HIGH_BYTES && FORM_HIGH_BYTES + sizeof(struct bt_mode) == 8, "both fit into a key");

/* The form's bytes, then what of struct bt_mode decoding depends on. */
struct form_key {
    uint64_t low, high;
};

struct form {
    struct form_key key;
    struct tinsn insn;
};

/* Forms lie one after the other as they come, so that few take little memory. */
struct bt_forms {
    uint16_t used;
    uint16_t number[FORMS / WAYS][WAYS]; /* of a form, the newest first; 0: none */
    struct form form[FORMS + 1];         /* number 0 has the key of nothing */
};

struct bt_forms *forms_create(void)
{
    return calloc(1, sizeof(struct bt_forms));
}

void forms_destroy(struct bt_forms *forms)
{
    free(forms);
}

/* ---- where a form ends ---- */

/* Bit per opcode, 64-bit mode: has ModRM (SDM vol. 2D, tables; what is not defined there is never stored). Those of 32-bit code have it or not just the same. */
static const uint32_t has_modrm[8] = {0x0f0f0f0f, 0x0f0f0f0f, 0x00000000, 0x00000a08, 0x0000ffff, 0x00000000, 0xff0f00c3, 0xc0c00000};
static const uint32_t has_modrm_0f[8] = {0xffffb41f, 0xff00ffff, 0xffffffff, 0xff7fffff, 0xffff0000, 0xfffff8f8, 0xffff00ff, 0xffffffff};

static bool bit_of(const uint32_t bits[8], uint8_t byte)
{
    return bits[byte >> 5] >> (byte & 31) & 1;
}

static bool is_prefix(uint8_t byte, bool narrow)
{
    static const uint32_t prefixes[8] = {0, 0x40404040, 0x0000ffff, 0x000000f0, 0, 0, 0, 0x000d0000}; /* segments; REX; 64..67; LOCK, REPNE, REP */
    return bit_of(prefixes, byte) && !(narrow && (byte & 0xf0) == 0x40);
}

/* Number of bytes up to the first value, of at least 16 that can be read; 0: too long, or of no interest. narrow: in 32-bit code. */
static unsigned form_length(const uint8_t *p, bool narrow)
{
    unsigned n = 0;
    while (n < 5 && is_prefix(p[n], narrow))
        n++;
    bool modrm = true;
    uint8_t opcode = p[n++];
    if (narrow && (opcode == 0xc4 || opcode == 0xc5 || opcode == 0x62) && p[n] < 0xc0)
        return 0; /* LES, LDS, BOUND */
    switch (opcode) {
    case 0x0f:
        opcode = p[n++];
        if (opcode == 0x38 || opcode == 0x3a)
            n++;
        else
            modrm = bit_of(has_modrm_0f, opcode);
        break;
    case 0xc5: /* VEX: VZEROUPPER is alone without ModRM */
        modrm = p[n + 1] != 0x77;
        n += 2;
        break;
    case 0xc4:
        modrm = p[n + 2] != 0x77 || (p[n] & 31) != 1;
        n += 3;
        break;
    case 0x62: /* EVEX */
        n += 4;
        break;
    default:
        modrm = bit_of(has_modrm, opcode);
        break;
    }
    if (modrm) {
        uint8_t byte = p[n++];
        n += byte < 0xc0 && (byte & 7) == 4; /* SIB */
    }
    return n <= FORM_BYTES_MAX ? n : 0;
}

/* ---- the table ---- */

/* False: there are no forms for it. */
static bool key_make(const struct bt_mode *mode, const uint8_t *bytes, struct form_key *key, unsigned *length)
{
    uint64_t word[2], kept = 0;
    *length = form_length(bytes, mode->code_bits == 32);
    memcpy(word, bytes, sizeof(word));
    memcpy(&kept, mode, sizeof(*mode));
    unsigned low = *length < 8 ? *length : 8, high = *length - low;
    key->low = low == 8 ? word[0] : word[0] & ((1ull << low * 8) - 1);
    key->high = (word[1] & ((1ull << high * 8) - 1)) | kept << FORM_HIGH_BYTES * 8;
    return *length;
}

static uint16_t *set_of(struct bt_forms *forms, const struct form_key *key)
{
    uint64_t hash = key->low * 0x9e3779b97f4a7c15ull;
    hash = ((hash ^ hash >> 32) + key->high) * 0x9e3779b97f4a7c15ull;
    return forms->number[(hash >> 40) % (FORMS / WAYS)];
}

static bool keys_equal(const struct form_key *a, const struct form_key *b)
{
    return a->low == b->low && a->high == b->high;
}

const struct tinsn *forms_find(struct bt_forms *forms, const struct bt_mode *mode, const uint8_t *bytes)
{
    struct form_key key;
    unsigned length;
    if (!key_make(mode, bytes, &key, &length))
        return NULL;
    const uint16_t *set = set_of(forms, &key);
    for (unsigned n = 0; n < WAYS; n++)
        if (keys_equal(&forms->form[set[n]].key, &key))
            return &forms->form[set[n]].insn;
    return NULL;
}

/* Nothing but values comes after ModRM and SIB, except the opcode that 3DNow! has last; and EVEX scales 8-bit displacements. */
void forms_store(struct bt_forms *forms, const struct bt_mode *mode, const uint8_t *bytes, const struct tinsn *insn)
{
    struct form_key key;
    unsigned length, decoded = insn->disp_bytes ? insn->disp_at : insn->imm_bytes ? insn->imm_at : insn->length;
    bool scaled = insn->encoding == ZYDIS_INSTRUCTION_ENCODING_EVEX && insn->disp_bytes == 1;
    if (!key_make(mode, bytes, &key, &length) || length != decoded || scaled || insn->encoding == ZYDIS_INSTRUCTION_ENCODING_3DNOW)
        return;
    uint16_t *set = set_of(forms, &key);
    if (!keys_equal(&forms->form[set[0]].key, &key)) {
        uint16_t oldest = set[WAYS - 1];
        memmove(set + 1, set, (WAYS - 1) * sizeof(*set));
        set[0] = oldest ? oldest : ++forms->used;
    }
    forms->form[set[0]] = (struct form){key, *insn};
}
