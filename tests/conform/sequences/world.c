/*
 * Worlds: where in linear and physical memory a guest's code and data lie, with which rights, and at which privilege.
 *
 * Data are DATA_PAGES linear pages over scattered physical ones, a few of them with less than all rights, and a twin region whose table entries are the same as theirs
 * (bt_priv.h: BT_ALIAS_BITS). Code has two neighbours in linear memory, two pages elsewhere, and a twin mapping. Some worlds have two address spaces with the same code and the same
 * pages of data in another order. Page tables are mapped for the supervisor. The guest's exceptions go to handlers that halt, on a stack of their own, so whatever RSP is, the frame tells.
 */
#include "sequence.h"

#include <string.h>

#include "arch/paging.h"

#define P 1ull
#define RW 2ull
#define US 4ull
#define ACCESSED 0x20ull
#define DIRTY 0x40ull
#define PS 0x80ull
#define GLOBAL 0x100ull
#define RESERVED (1ull << 51)
#define NX (1ull << 63)

#define TABLES 0x100000u
#define ROM 0xf00000u
#define ROM_PAGES 4u
#define POOL 0x200000u /* pages are taken at random from here up to ROM */
#define KERNEL_STACK (TINY_STACK & ~0xfffu)
#define FIXERS 0xb000u /* code of handlers that return */
#define FIXABLE 0xc000u /* pairs: a page, linear address of its entry; ends with zero */

_Static_assert(sizeof ((struct world *)0)->large_page == 2u << 20, "one large page");

static uint8_t *at(struct tiny_vm *vm, gpa_t gpa)
{
    return physmap_get(vm->memory, gpa, PAGE_SIZE_BYTES - (gpa & PAGE_MASK_BITS), PHYSMAP_READ);
}

/* ---- page tables ---- */

struct builder {
    struct world *w;
    struct generator *g;
    struct tiny_vm *vm;
    unsigned tables, root;
};

static gpa_t table_new(struct builder *b)
{
    gpa_t gpa = TABLES + PAGE_SIZE_BYTES * b->tables++;
    memset(at(b->vm, gpa), 0, PAGE_SIZE_BYTES);
    return gpa;
}

static void map(struct builder *b, gva_t gva, uint64_t leaf, unsigned level)
{
    gpa_t table = b->w->root[b->root];
    for (unsigned n = 4;; n--) {
        uint64_t *entry = (uint64_t *)at(b->vm, table) + (gva >> (3 + 9 * n) & 511);
        if (n == level) {
            *entry = leaf;
            return;
        }
        if (!*entry)
            *entry = table_new(b) | P | RW | US;
        table = *entry & 0xfffff000;
    }
}

gpa_t world_entry(const struct world *w, struct tiny_vm *vm, gva_t gva)
{
    gpa_t table = vm->vcpu->cpu.cr3 & 0xfffff000;
    for (unsigned n = 4;; n--) {
        gpa_t entry = table + (gva >> (3 + 9 * n) & 511) * 8;
        uint64_t value;
        memcpy(&value, at(vm, entry), 8);
        if (n == 1 || (value & PS))
            return entry;
        if (!(value & P) || (value & 0xffffff000) >= TINY_RAM_BYTES)
            return 0;
        table = value & 0xfffff000;
    }
}

/* ---- pages ---- */

static void track(struct world *w, gpa_t gpa)
{
    for (unsigned n = 0; n < w->tracked_count; n++)
        if (w->tracked[n] == gpa)
            return;
    w->tracked[w->tracked_count++] = gpa;
}

static gpa_t page_take(struct builder *b)
{
    for (;;) {
        gpa_t gpa = POOL + PAGE_SIZE_BYTES * encode_pick(b->g, (ROM - POOL) / PAGE_SIZE_BYTES);
        bool taken = b->w->large && gpa < POOL + (4u << 20); /* the data's own */
        for (unsigned n = 0; n < b->w->tracked_count; n++)
            taken |= b->w->tracked[n] == gpa;
        if (!taken) {
            track(b->w, gpa);
            return gpa;
        }
    }
}

static uint64_t random_bits(struct builder *b)
{
    uint64_t global = b->w->roots == 1 ? GLOBAL : 0; /* else a page could be another in the other address space and still be used legally */
    return (generator_random(b->g) & (ACCESSED | global)) | (encode_pick(b->g, 2) ? DIRTY | ACCESSED : 0);
}

static enum page_kind kind_pick(struct builder *b)
{
    if (b->w->fixing && !encode_pick(b->g, 3))
        return PAGE_ABSENT;
    static const uint8_t special[] = {PAGE_READ_ONLY, PAGE_READ_ONLY, PAGE_ABSENT, PAGE_ABSENT, PAGE_OTHERS, PAGE_MMIO, PAGE_ROM, PAGE_RESERVED};
    return b->w->native || encode_pick(b->g, 3) ? PAGE_ORDINARY : (enum page_kind)special[encode_pick(b->g, sizeof special)];
}

static void page_map(struct builder *b, gva_t gva, gpa_t gpa, enum page_kind kind)
{
    struct world *w = b->w;
    uint64_t leaf = gpa | P | RW | (w->user ? US : 0) | random_bits(b);
    if (kind != PAGE_CODE)
        leaf |= NX;
    if (kind == PAGE_READ_ONLY || (kind == PAGE_CODE && !w->smc))
        leaf &= ~(RW | DIRTY);
    if (kind == PAGE_ABSENT)
        leaf &= ~P;
    if (kind == PAGE_OTHERS)
        leaf ^= US;
    if (kind == PAGE_RESERVED)
        leaf |= RESERVED;
    if (!b->root)
        w->page[w->page_count++] = (struct page){gva, gpa, (uint8_t)kind};
    map(b, gva, leaf, 1);
}

/* Memory that is data's already. */
static gpa_t page_again(struct builder *b)
{
    const struct page *page;
    do
        page = &b->w->page[encode_pick(b->g, b->w->page_count)];
    while (page->kind == PAGE_CODE || page->kind == PAGE_MMIO || page->kind == PAGE_ROM);
    return page->gpa;
}

static void data_page_map(struct builder *b, gva_t gva)
{
    struct world *w = b->w;
    enum page_kind kind = kind_pick(b);
    if (kind == PAGE_MMIO)
        page_map(b, gva, TINY_MMIO, kind);
    else if (kind == PAGE_ROM)
        page_map(b, gva, ROM + PAGE_SIZE_BYTES * encode_pick(b->g, ROM_PAGES), kind);
    else if (b->root || (!w->native && w->page_count > 2 && !encode_pick(b->g, 12) && w->page[w->page_count - 1].kind == PAGE_ORDINARY))
        page_map(b, gva, b->root ? page_again(b) : w->page[w->page_count - 1].gpa, kind);
    else
        page_map(b, gva, page_take(b), kind);
}

/* All of the data in one page of 2 MiB. */
static void data_map_large(struct builder *b)
{
    struct world *w = b->w;
    gva_t start = w->data & ~0x1fffffull;
    map(b, start, POOL | P | RW | PS | NX | (w->user ? US : 0) | random_bits(b), 2);
    for (unsigned n = 0; n < DATA_PAGES; n++) {
        gva_t gva = w->data + n * PAGE_SIZE_BYTES;
        gpa_t gpa = POOL + (gva - start);
        w->page[w->page_count++] = (struct page){gva, gpa, PAGE_ORDINARY};
        track(w, gpa);
    }
}

/* ---- addresses ---- */

static gva_t canonical(gva_t gva)
{
    return (gva_t)((int64_t)(gva << 16) >> 16);
}

/* What 32-bit code reaches; the last bytes of 4 GiB and the first 2 MiB are among it. */
static void places_pick_low(struct builder *b)
{
    static const struct {
        uint32_t data, code;
    } places[] = {{0x40000000, 0x8048000}, {0x10000, 0x5000}, {0x300000, 0x100000}, {0xfff00000, 0xffffe000}, {0xffff8000, 0x7fffe000}, {0x7fff8000, 0xc0100000}, {0, 0x3fe000}};
    struct world *w = b->w;
    unsigned n = encode_pick(b->g, 9);
    bool random = n >= sizeof places / sizeof *places;
    w->data = random ? (uint32_t)generator_random(b->g) & ~0x3fffffu : places[n].data;
    if (w->large)
        w->data = (w->data & ~0x1fffffull) + 0x100000;
    gva_t code = random ? w->data ^ (0x400000u << encode_pick(b->g, 9)) : w->large && places[n].code < 0x400000 ? 0x8048000 : places[n].code;
    w->twin_data = w->data ^ (1ull << (41 + encode_pick(b->g, 6)));
    w->code[0] = code;
    w->code[1] = code + PAGE_SIZE_BYTES;
    w->code[2] = code ^ 0x1000000;
    w->code[3] = code ^ (1ull << (25 + encode_pick(b->g, 6)));
    w->twin_code = code ^ 0x80000000;
}

static void places_pick(struct builder *b)
{
    static const gva_t bases[] = {
        0x40000000,         0x7fff8000,         0xffff8000,         0x7fffffff0000 - 0x1000, 0xffff800000000000, 0xffffffff80000000,
        0xffffffffffff0000, 0x0000555555554000, 0x000001fffffff000, 0xffff888012345000,      0x00007f0000000000, 0x10000000,
    };
    struct world *w = b->w;
    unsigned n = encode_pick(b->g, 16);
    w->data = n < sizeof bases / sizeof *bases ? bases[n] : canonical(generator_random(b->g) & ~PAGE_MASK_BITS);
    if (w->native)
        w->data = AREA;
    if (w->large)
        w->data = (w->data & ~0x1fffffull) + 0x100000;
    if (w->low) {
        places_pick_low(b);
        return;
    }
    gva_t code = w->data + (w->data >> 40 == 0x7f || w->data > 0xffffffffffe00000ull ? -0x400000ull : 0x400000ull);
    w->twin_data = canonical(w->data ^ (1ull << (41 + encode_pick(b->g, 6))));
    w->code[0] = code;
    w->code[1] = code + PAGE_SIZE_BYTES;
    w->code[2] = code + 3 * PAGE_SIZE_BYTES;
    w->code[3] = w->native ? code + 5 * PAGE_SIZE_BYTES : canonical(code ^ (1ull << (31 + encode_pick(b->g, 8))));
    w->twin_code = canonical(code ^ (1ull << (39 + encode_pick(b->g, 8))));
}

static void pages_make(struct builder *b)
{
    struct world *w = b->w;
    if (w->large)
        data_map_large(b);
    for (unsigned n = 0; n < DATA_PAGES && !w->large; n++)
        data_page_map(b, w->data + n * PAGE_SIZE_BYTES);
    for (unsigned n = 0; n < CODE_PAGES; n++) {
        if (!b->root)
            w->code_gpa[n] = page_take(b);
        page_map(b, w->code[n], w->code_gpa[n], PAGE_CODE);
    }
    if (w->native)
        return;
    for (unsigned n = 0; n < 4 && !w->large; n++)
        data_page_map(b, w->twin_data + n * PAGE_SIZE_BYTES);
    page_map(b, w->twin_code, w->code_gpa[0], PAGE_CODE);
}

/* ---- what the processor needs ---- */

static uint64_t descriptor(unsigned access, unsigned flags)
{
    return 0xffffull | (uint64_t)access << 40 | (uint64_t)(flags << 4 | 0xf) << 48;
}

static void put64(struct builder *b, gpa_t gpa, uint64_t value)
{
    memcpy(at(b->vm, gpa), &value, 8);
}

static const gpa_t kernel_pages[] = {TINY_GDT, TINY_IDT, TINY_TSS, KERNEL_STACK, TINY_HANDLER, FIXERS, FIXABLE};

/* Handlers of vector 7, of interrupts, and of page faults, which goes to the one that halts when the page cannot be had. */
__asm__(".pushsection .rodata\n"
        "fix_nm:\n clts\n iretq\n .balign 16\n"
        "fix_interrupt:\n iretq\n .balign 16\n"
        "fix_pf:\n push %rax\n push %rcx\n testb $1, 16(%rsp)\n jnz 3f\n mov %cr2, %rax\n and $-4096, %rax\n lea fix_pf + 0x1000 - 0x20(%rip), %rcx\n"
        "1: cmpq $0, (%rcx)\n je 3f\n cmp %rax, (%rcx)\n je 2f\n add $16, %rcx\n jmp 1b\n"
        "2: mov 8(%rcx), %rcx\n orb $1, (%rcx)\n pop %rcx\n pop %rax\n add $8, %rsp\n iretq\n"
        "3: pop %rcx\n pop %rax\n .byte 0xe9\n .long fix_nm - 0x2000 + 14 * 16 - 4f\n"
        "4:\nfix_end:\n.popsection");
extern const uint8_t fix_nm[], fix_interrupt[], fix_pf[], fix_end[];
_Static_assert(FIXABLE - FIXERS == 0x1000 && FIXERS - TINY_HANDLER == 0x2000, "fix_pf is at FIXERS + 0x20");

static void kernel_map(struct builder *b)
{
    for (unsigned n = 0; n < sizeof kernel_pages / sizeof *kernel_pages; n++) {
        gpa_t gpa = kernel_pages[n];
        map(b, KERNEL + gpa, gpa | P | ACCESSED | (gpa == KERNEL_STACK ? RW | DIRTY : 0) | (gpa == TINY_HANDLER || gpa == FIXERS ? 0 : NX), 1);
    }
}

static void gate_put(struct builder *b, unsigned vector, gpa_t handler, uint64_t ist)
{
    uint64_t to = KERNEL + handler;
    put64(b, TINY_IDT + 16 * vector, (to & 0xffff) | TINY_CS64 << 16 | ist << 32 | 0xeeull << 40 | (to >> 16 & 0xffff) << 48);
    put64(b, TINY_IDT + 16 * vector + 8, to >> 32);
}

static void fixers_make(struct builder *b)
{
    uint64_t ist = encode_pick(b->g, 2);
    memcpy(at(b->vm, FIXERS), fix_nm, (size_t)(fix_end - fix_nm));
    gate_put(b, VECTOR_NM, FIXERS, ist);
    gate_put(b, VECTOR_PF, FIXERS + (gpa_t)(fix_pf - fix_nm), ist);
    gate_put(b, INTERRUPT, FIXERS + (gpa_t)(fix_interrupt - fix_nm), ist);
    gate_put(b, SOFTWARE_INTERRUPT, FIXERS + (gpa_t)(fix_interrupt - fix_nm), ist);
}

static void low_descriptors_put(struct builder *b)
{
    uint32_t base = (uint32_t)(b->w->data + encode_pick(b->g, 0x8000)) - encode_pick(b->g, 256);
    uint64_t based = (uint64_t)(base & 0xffffff) << 16 | (uint64_t)(base >> 24) << 56;
    put64(b, TINY_GDT + TINY_CS32, descriptor(0x9b, 0xc));
    put64(b, TINY_GDT + (TINY_USER_CS32 & ~3), descriptor(0xfb, 0xc));
    put64(b, TINY_GDT + (WORLD_LIMITED & ~3), (descriptor(0xf3, 0xc) & ~(0xfull << 48)) | (generator_random(b->g) & 7) << 48);
    put64(b, TINY_GDT + (WORLD_BASED & ~3), (descriptor(0xf3, 0x4) & ~(0xfull << 48)) | based | 1ull << 48);
    put64(b, TINY_GDT + (WORLD_READ_ONLY & ~3), descriptor(0xf1, 0xc));
    put64(b, TINY_GDT + (WORLD_DOWN & ~3), (descriptor(0xf7, 0xc) & ~0xffffull & ~(0xfull << 48)) | 0x10);
    put64(b, TINY_GDT + (WORLD_THREAD & ~3), descriptor(0xf3, 0xc) | based);
}

static void kernel_make(struct builder *b)
{
    for (unsigned n = 0; n < sizeof kernel_pages / sizeof *kernel_pages; n++)
        memset(at(b->vm, kernel_pages[n]), 0, PAGE_SIZE_BYTES);
    track(b->w, KERNEL_STACK);
    put64(b, TINY_GDT + TINY_CS64, descriptor(0x9b, 0xa));
    put64(b, TINY_GDT + TINY_DS, descriptor(0x93, 0xc));
    put64(b, TINY_GDT + (TINY_USER_DS & ~3), descriptor(0xf3, 0xc));
    put64(b, TINY_GDT + (TINY_USER_CS64 & ~3), descriptor(0xfb, 0xa));
    if (b->w->low)
        low_descriptors_put(b);
    put64(b, TINY_TSS + 4, KERNEL + TINY_STACK);
    put64(b, TINY_TSS + 36, KERNEL + TINY_STACK); /* IST1 */
    put64(b, TINY_TSS + 0x60, 0xffffull << 48);   /* no I/O permission map */
    for (unsigned n = 0; n < 256; n++) {
        *(uint8_t *)at(b->vm, TINY_HANDLER + 16 * n) = 0xf4;
        gate_put(b, n, TINY_HANDLER + 16 * n, 1);
    }
    if (b->w->fixing)
        fixers_make(b);
}

static struct segment flat(uint16_t selector, uint16_t attributes)
{
    return (struct segment){.selector = selector, .attributes = attributes, .limit = 0xffffffff};
}

static void registers_make(struct builder *b)
{
    struct world *w = b->w;
    struct generator *g = b->g;
    struct cpu_state *cpu = &w->start;
    uint64_t cr4 = cpuid_cr4_allowed(b->vm->cpuid);
    cpu->cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_MP | CR0_AM | CR0_PG | (w->user || encode_pick(g, 4) ? CR0_WP : 0);
    cpu->cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR | CR4_OSXSAVE | CR4_OSXMMEXCPT | (encode_pick(g, 4) ? CR4_FSGSBASE & cr4 : 0);
    if (!encode_pick(g, w->user ? 4 : 2))
        cpu->cr4 |= CR4_SMAP & cr4;
    if (!encode_pick(g, w->user ? 8 : 2))
        cpu->cr4 |= CR4_SMEP & cr4;
    if (w->roots > 1 && encode_pick(g, 2))
        cpu->cr4 |= CR4_PCIDE & cr4;
    cpu->cr3 = w->root[0] | (cpu->cr4 & CR4_PCIDE ? 1 : 0);
    cpu->efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
    cpu->xcr0 = g->xcr0;
    cpu->rflags = RFLAGS_FIXED;
    cpu->msr_star = (uint64_t)TINY_CS64 << 32 | (uint64_t)(TINY_CS32 & ~3) << 48;
    cpu->msr_lstar = w->code[encode_pick(g, CODE_PAGES)] + encode_pick(g, 4096);
    cpu->msr_sfmask = generator_random(g) & (RFLAGS_OSZAPC | RFLAGS_IF | RFLAGS_DF | RFLAGS_AC | RFLAGS_TF);
    if (encode_pick(g, 3)) /* as systems have it */
        cpu->msr_sfmask |= RFLAGS_OSZAPC | RFLAGS_DF;
    cpu->msr_kernel_gs_base = w->data + encode_pick(g, 0x8000);
}

static void start_make(struct builder *b)
{
    struct world *w = b->w;
    struct cpu_state *cpu = &w->start;
    cpu_reset(cpu, CPU_RESET_POWER_ON);
    for (unsigned n = 0; n < SEG_COUNT; n++)
        cpu->seg[n] = w->user ? flat(TINY_USER_DS, 0xc0f3) : flat(TINY_DS, 0xc093);
    cpu->seg[SEG_CS] = w->user ? flat(TINY_USER_CS64, 0xa0fb) : flat(TINY_CS64, 0xa09b);
    if (w->low && encode_pick(b->g, 8))
        cpu->seg[SEG_CS] = w->user ? flat(TINY_USER_CS32, 0xc0fb) : flat(TINY_CS32, 0xc09b);
    cpu->seg[SEG_FS].base = encode_pick(b->g, 2) ? w->data + encode_pick(b->g, 0x8000) : encode_pick(b->g, 0x10000);
    cpu->seg[SEG_GS].base = encode_pick(b->g, 2) ? canonical(w->data + 0x4000 - (generator_random(b->g) & 0x7fffffff)) : w->data;
    cpu->gdtr = (struct descriptor_table){KERNEL + TINY_GDT, w->low ? WORLD_GDT_LIMIT : 0x4f};
    cpu->idtr = (struct descriptor_table){KERNEL + TINY_IDT, 0xfff};
    cpu->tr = (struct segment){.selector = TINY_TR, .base = KERNEL + TINY_TSS, .limit = 0x67, .attributes = 0x8b};
    registers_make(b);
}

/* ---- all together ---- */

static void fixable_make(struct builder *b)
{
    gpa_t to = FIXABLE;
    for (unsigned n = 0; n < b->w->page_count; n++)
        if (b->w->page[n].kind == PAGE_ABSENT || b->w->page[n].kind == PAGE_ORDINARY) {
            put64(b, to, b->w->page[n].gva);
            put64(b, to + 8, KERNEL + world_entry(b->w, b->vm, b->w->page[n].gva));
            to += 16;
        }
}

static void roots_make(struct builder *b)
{
    struct world *w = b->w;
    for (b->root = 0; b->root < w->roots; b->root++) {
        w->root[b->root] = table_new(b);
        kernel_map(b);
        pages_make(b);
    }
    for (b->root = 0; b->root < w->roots; b->root++) /* mapping them makes at most one more, for both */
        for (unsigned n = 0; n < b->tables; n++)
            map(b, KERNEL + TABLES + n * PAGE_SIZE_BYTES, (TABLES + n * PAGE_SIZE_BYTES) | P | RW | ACCESSED | DIRTY | NX, 1);
}

static void memory_make(struct builder *b)
{
    struct world *w = b->w;
    for (unsigned n = 0; n < w->page_count; n++)
        if (w->page[n].kind != PAGE_CODE && w->page[n].gpa != TINY_MMIO)
            generator_bytes(b->g, at(b->vm, w->page[n].gpa), PAGE_SIZE_BYTES);
    w->tracked_tables = w->tracked_count;
    for (unsigned n = 0; n < b->tables; n++)
        track(w, TABLES + n * PAGE_SIZE_BYTES);
    for (unsigned n = 0; n < w->tracked_count; n++)
        memcpy(w->snapshot[n], at(b->vm, w->tracked[n]), PAGE_SIZE_BYTES);
    memcpy(w->large_page, at(b->vm, POOL), sizeof w->large_page);
}

void world_make(struct world *w, struct generator *g, uint64_t seed, uint64_t number, bool low, struct tiny_vm *const vm[2])
{
    struct builder b = {.w = w, .g = g, .vm = vm[0]};
    memset(w, 0, sizeof *w);
    g->seed = (seed << 40 ^ number << 8 ^ 0x5e) * 0x9e3779b97f4a7c15ull | 1;
    for (unsigned n = 0; n < 4; n++)
        generator_random(g);
    w->number = number;
    w->low = low;
    w->native = !w->low && !encode_pick(g, 4);
    w->user = w->native || encode_pick(g, 2);
    w->large = !w->native && !encode_pick(g, 6);
    w->smc = !w->native && !encode_pick(g, 6);
    w->roots = !w->native && !w->large && !encode_pick(g, 3) ? 2 : 1;
    w->fixing = !w->native && w->roots == 1 && encode_pick(g, 2);
    physmap_zero(vm[0]->memory);
    physmap_zero(vm[1]->memory);
    for (unsigned n = 0; n < 2; n++)
        w->broken |= !physmap_is_rom(vm[n]->memory, ROM) && physmap_set_rom(vm[n]->memory, ROM, ROM_PAGES * PAGE_SIZE_BYTES);
    places_pick(&b);
    kernel_make(&b);
    roots_make(&b);
    start_make(&b);
    vm[0]->vcpu->cpu = w->start;
    if (w->fixing)
        fixable_make(&b);
    memory_make(&b);
    for (gpa_t gpa = 0; gpa < TINY_RAM_BYTES; gpa += PAGE_SIZE_BYTES)
        if (memcmp(at(vm[1], gpa), at(vm[0], gpa), PAGE_SIZE_BYTES))
            memcpy(at(vm[1], gpa), at(vm[0], gpa), PAGE_SIZE_BYTES);
}

/* ---- questions ---- */

bool world_walk(struct tiny_vm *vm, gva_t gva, unsigned access, gpa_t *gpa)
{
    const struct cpu_state *cpu = &vm->vcpu->cpu;
    struct paging_result page;
    uint32_t error;
    if (cpu_cpl(cpu) == 3)
        access |= PAGING_USER;
    else if (cpu->rflags & RFLAGS_AC)
        access |= PAGING_AC;
    if (paging_walk(vm->memory, cpu, cpuid_physical_address_bits(vm->cpuid), gva, access | PAGING_NO_UPDATE, &page, &error))
        return false;
    *gpa = page.gpa;
    return true;
}

static int code_number(const struct world *w, gpa_t gpa)
{
    for (int n = 0; n < CODE_PAGES; n++)
        if (w->code_gpa[n] == gpa)
            return n;
    return -1;
}

int world_code_offset(const struct world *w, struct tiny_vm *vm, gva_t gva)
{
    gpa_t gpa;
    if (!world_walk(vm, gva, PAGING_FETCH, &gpa))
        return -1;
    int n = code_number(w, gpa & ~PAGE_MASK_BITS);
    return n < 0 ? -1 : n * (int)PAGE_SIZE_BYTES + (int)(gpa & PAGE_MASK_BITS);
}

void world_restore(const struct world *w, struct tiny_vm *vm, bool tables)
{
    unsigned count = tables ? w->tracked_count : w->tracked_tables;
    if (w->thorough)
        memcpy(at(vm, POOL), w->large_page, sizeof w->large_page);
    for (unsigned n = 0; n < count; n++)
        if (code_number(w, w->tracked[n]) < 0)
            memcpy(at(vm, w->tracked[n]), w->snapshot[n], PAGE_SIZE_BYTES);
}
