#!/usr/bin/env python3
"""Breaks each step of docs/security.md on purpose, in a copy of the tree, and says whether the tests named there notice.

usage: mutants.py [NAME...]   (all, or those whose name begins so; about half an hour on two processors)

Exit status 1 when a test that should fail passes, or a mutant does not fit the sources any more. By hand, after changes to the translator.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PROCESSORS = {"codegen": 2, "tlbshoot": 2}
UNITS = ("layout", "tables", "verify", "analyze", "forms", "cache", "fault")
SEQUENCES = "tests/conform/sequences/conform_sequences"

# name (the step's number first), file below src/engine/bt, text, what it becomes, tests that must fail
MUTANTS = [
    ("1 executable mapping writable", "layout.c", "PROT_READ | PROT_EXEC, MAP_SHARED", "PROT_READ | PROT_WRITE | PROT_EXEC, MAP_SHARED", ["layout"]),
    ("1 writable mapping executable", "layout.c", "mprotect(rw, layout->tc_bytes, PROT_READ | PROT_WRITE)", "mprotect(rw, layout->tc_bytes, PROT_READ | PROT_WRITE | PROT_EXEC)",
     ["layout"]),
    ("1 window executable", "layout.c", "layout->window_w, PROT_READ | PROT_WRITE)", "layout->window_w, PROT_READ | PROT_WRITE | PROT_EXEC)", ["layout"]),
    ("2 everything is plain", "analyze.c", "return d->zi.meta.category == ZYDIS_CATEGORY_CMOV || d->zi.meta.category == ZYDIS_CATEGORY_SETCC;",
     "return d->zi.mnemonic != ZYDIS_MNEMONIC_INT3;", ["verify"]),
    ("2 moves of segment registers", "analyze.c", "class != ZYDIS_REGCLASS_GPR64)", "class != ZYDIS_REGCLASS_GPR64 && class != ZYDIS_REGCLASS_SEGMENT)", ["verify"]),
    ("2 bit offsets in registers", "analyze.c", "return d->op[0].type == ZYDIS_OPERAND_TYPE_REGISTER || d->op[1].type == ZYDIS_OPERAND_TYPE_IMMEDIATE;", "return true;",
     ["verify", "analyze"]),
    ("2 size of operands", "analyze.c", "t->mem_size = op->size / 8;", "t->mem_size = (uint16_t)(op->size / 16 + 1);", ["analyze"]),
    ("2 forms of any mode", "forms.c", "    memcpy(&kept, mode, sizeof(*mode));\n", "    kept = 1;\n", ["forms"]),
    ("2 forms of any length", "forms.c", " || length != decoded || scaled", " || scaled", ["forms"]),
    ("2 fourth registers", "analyze.c", "        if (op->encoding == ZYDIS_OPERAND_ENCODING_IS4)", "        if (op->encoding == ZYDIS_OPERAND_ENCODING_IS4 && d->bytes[d->zi.length - 1] & 0x80)", ["forms", "compat"]),
    ("3 segment prefix kept", "access.c", "if (!is_segment_prefix(p[n]) && ", "if (", ["verify"]),
    ("4 one alias less", "layout.c", "for (unsigned n = 0; n < BT_ALIASES; n++) {\n        int rc = map_exactly", "for (unsigned n = 0; n < BT_ALIASES - 1; n++) {\n        int rc = map_exactly",
     ["layout"]),
    ("4 poison elsewhere", "tables.c", "return bt_poison_v(l, entry << PAGE_SHIFT);", "return bt_poison_v(l, entry << PAGE_SHIFT) + (2ull << 20);", ["tables"]),
    ("4 no poison", "tables.c", "exec_poison(l, gva, first + n) : data_poison(l, first + n);\n    uint16_t", "exec_poison(l, gva, first + n) : start[n];\n    uint16_t", ["tables"]),
    ("4 dropping leaves entries", "tables.c", "exec_poison_again(l, first + n, e[n]) : data_poison(l, first + n);", "exec_poison_again(l, first + n, e[n]) : e[n];", ["tables", "tlbshoot"]),
    ("5 privilege", "tables.c", "[KIND_USER] = PAGING_USER};", "[KIND_USER] = 0};", ["tables", "hostile", "paging"]),
    ("5 window R writable", "layout.c", "physmap_map(memory, layout->window_r, PROT_READ);", "physmap_map(memory, layout->window_r, PROT_READ | PROT_WRITE);", ["layout"]),
    ("5 always writable", "tables.c", "uint8_t *window = writable && !page_is_code(e, offset) ? e", "uint8_t *window = !page_is_code(e, offset) ? e", ["tables", "hostile", "paging"]),
    ("5 INVLPG", "tables.c", "        table_drop_page(b->tables, &b->engine->layout, &view->data, gva);\n", "", ["tables", "tlbshoot", "hostile", "paging"]),
    ("5 flushes", "tables.c", "        b->tables->view[n].drop_all = true;", "        (void)n;", ["tables", "tlbshoot", "paging"]),
    ("5 SMAP", "tables.c", "[KIND_SUPERVISOR] = 0,", "[KIND_SUPERVISOR] = PAGING_AC,", ["tables", "hostile", "paging"]),
    ("6 no crossing check", "access.c", "    if (size > 1) {\n        emit_pext", "    if (size > 99) {\n        emit_pext", ["verify", "sites", "hostile"]),
    ("6 group check one short", "access.c", "BT_SPLIT + (int32_t)size - 1", "BT_SPLIT + (int32_t)size - 2", ["verify"]),
    ("6 no guard", "layout.c", "round_up(p.window_w + ram_bytes + BT_GUARD_BYTES, ALIGNMENT)", "round_up(p.window_w + ram_bytes, ALIGNMENT)", ["layout"]),
    ("6 end of strings", "string.c", "emit_lea(&t->out, to, to, GPR_RCX, shift, -1);", "emit_lea(&t->out, to, to, GPR_RCX, shift, -2);", ["verify", "hostile"]),
    ("7 top bits", "bt_priv.h", "#define BT_EXEC_MASK (3ul << 62 | ", "#define BT_EXEC_MASK (", ["tables", "hostile"]),
    ("7 pages beside the witness", "layout.c", "mprotect(layout->witness, PAGE_SIZE_BYTES, PROT_READ)", "mprotect(layout->witness - (1 << 20), 2 << 20, PROT_READ)", ["layout"]),
    ("7 first page of the exec table", "tables.c", "size_t skip = table->exec && !number ? PAGE_SIZE_BYTES : 0;", "size_t skip = 0;", ["tables"]),
    ("7 links at once", "cache.c", "    if (link_turn_over(e, wait->turn)) {", "    if (1) {", ["cache"]),
    ("8 no protection", "cache.c", "PAGE_SIZE_BYTES, PROT_READ)) { /* the host", "PAGE_SIZE_BYTES, PROT_READ | PROT_WRITE)) { /* the host", ["cache", "smc", "codegen"]),
    ("8 DMA", "cache.c", "        dropped |= page_drop(e, page);\n    if (dropped)", "        dropped |= false;\n    if (dropped)", ["cache"]),
    ("8 links stay", "cache.c", "        displacement_set(e, e->links[n - 1].at, e->links[n - 1].stub - (e->links[n - 1].at + 4));", "        (void)n;", ["codegen"]),
    ("8 no kick", "cache.c", "    if (page_drop(e, ram_offset & ~PAGE_MASK_BITS))\n        kick_all(e, false);", "    page_drop(e, ram_offset & ~PAGE_MASK_BITS);", ["codegen"]),
    ("8 stores of C code", "fault.c", "        if (e && code_dropped(e, address))\n            return true;", "        if (e && code_dropped(e, address ^ 4096))\n            return true;",
     ["fault", "codegen"]),
    ("8 crossing instructions stay", "cache.c", "    if (*flags & BT_CODE_CROSSED)", "    if (0)", ["codegen", "sequences"]),
    ("8 next page not checked", "transfer.c", "    emit_op_mem(&t->out, false, 0x8b, 10, 10, 11, 2, (int32_t)(t->e->layout.witness - (const uint8_t *)t->next->dt));", "", ["codegen", "sequences"]),
    ("9 GS prefix kept", "access.c", "!is_segment_prefix(p[n]) && ", "p[n] != 0x64 && ", ["verify"]),
    ("10 signal stack stays armed", "fault.c", ".ss_flags = (int)SS_AUTODISARM}", ".ss_flags = 0}", ["fault"]),
    ("10 signals not blocked", "fault.c", "    mask_set(&blocked, &thread.mask);", "    mask_set(&(const uint64_t){0}, &thread.mask);", ["fault"]),
    ("12 x87's last instruction", "../interp/native_state.c", "        put64(image + XSAVE_FIP, known ? a->fip : 0);", "        ;", ["sequences"]),
    ("12 spilled registers", "fault.c", "if (!(f->site->spilled >> n & 1))", "if (1)", ["fault", "sequences"]),
    ("12 flags", "fault.c", "((uint64_t)f->regs[REG_EFL] & FLAGS_GUEST) | FLAGS_HOST;", "((uint64_t)f->regs[REG_EFL] & FLAGS_GUEST & ~1ull) | FLAGS_HOST;", ["fault", "sequences"]),
    ("12 RSP of branches", "fault.c", "    gpr[GPR_RSP] -= (uint64_t)(int64_t)f->site->rsp_adjust;\n", "", ["fault", "hostile"]),
    ("12 rest of strings", "fault.c", "(greg_t)((end[STRING_RDI_END] - left) & mask);", "(greg_t)(end[STRING_RDI_END] & mask);", ["hostile", "sequences"]),
    ("8 epochs", "tables.c", "if (view->epoch != epoch || memcmp", "if (memcmp", ["tables"]),
    ("shares 1 names", "../../fs/serve.c", "        if (!fs_name_valid(*place[used]))\n            return -EINVAL;\n", "", ["share_escape"]),
    ("shares 2 links", "../../fs/node.c", "O_PATH | O_NOFOLLOW | O_CLOEXEC, .resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS}", "O_PATH | O_CLOEXEC}", ["share_escape"]),
    ("shares 2 another file", "../../fs/node.c", "        if (!same_file(&found, identity))\n            ret = -ESTALE;", "        (void)found;", ["share_fs"]),
    ("shares 3 device files", "../../fs/op_name.c", "    case S_IFSOCK: /*", "    case S_IFSOCK:\n    case S_IFCHR: /*", ["share_escape"]),
    ("shares 4 the kernel's files", "../../fs/node.c", ".refused = listed(", ".refused = false && listed(", ["share_escape"]),
    ("shares 5 set-ID bits", "../../fs/op_attr.c", "(type == S_IFDIR ? 07777u : 01777u)", "07777u", ["share_fs"]),
    ("shares 5 read-only", "../../fs/serve.c", "    if (fs->config.readonly && (operation->flags & WRITES))", "    if (0)", ["share_fs"]),
    ("shares 6 descriptors", "../../fs/node.c", "    while (fs->fd_count >= fs->fd_max) {", "    while (0) {", ["share_fs"]),
    ("shares 6 open files", "../../fs/handle.c", "    if (fs->handle_count < fs->handles_max && (", "    if ((", ["share_fs"]),
]


def command(tree, build, test):
    """What to build, and how to run it."""
    if test == "sequences":
        return [SEQUENCES], [os.path.join(build, SEQUENCES), "--count", "20000", "--seed", "3", "--findings", "1"]
    if test in UNITS:
        target = "tests/unit/engine/test_bt_" + test
        return [target], [os.path.join(build, target)]
    if test.startswith("share_"):
        target = "tests/unit/fs/test_" + test
        return [target], [os.path.join(build, target)]
    program = "tests/conform/" + test
    return ["doppel", program], [os.path.join(tree, "tests/conform/run.py"), os.path.join(build, program), "--doppel", os.path.join(build, "doppel"), "--engine", "bt",
                                 "--cpus", str(PROCESSORS.get(test, 1)), "--seconds", "90"]


def survives(line):
    try:
        return subprocess.run(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def try_mutant(tree, build, name, file, text, becomes, tests):
    """The tests that did not notice; None: it could not be made."""
    path = os.path.join(tree, "src/engine/bt", file)
    with open(path, encoding="utf-8") as source:
        before = source.read()
    if before.count(text) != 1:
        print(f"{name}: {file} has the text {before.count(text)} times")
        return None
    with open(path, "w", encoding="utf-8") as source:
        source.write(before.replace(text, becomes))
    try:
        commands = [command(tree, build, test) for test in tests]
        made = subprocess.run(["ninja", "-C", build] + sorted({target for targets, _ in commands for target in targets}), capture_output=True, text=True, check=False)
        if made.returncode:
            print(f"{name}: does not build\n{made.stdout[-2000:]}")
            return None
        return [test for test, (_, line) in zip(tests, commands) if survives(line)]
    finally:
        with open(path, "w", encoding="utf-8") as source:
            source.write(before)


def main():
    wanted = [m for m in MUTANTS if len(sys.argv) == 1 or any(m[0].startswith(name) for name in sys.argv[1:])]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="doppel-mutants-") as folder:
        tree, build = os.path.join(folder, "tree"), os.path.join(folder, "build")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns("build*", ".git", ".cache"))
        subprocess.run(["meson", "setup", build, tree, "--buildtype=debugoptimized"], stdout=subprocess.DEVNULL, check=True)
        for mutant in wanted:
            start = time.monotonic()
            unnoticed = try_mutant(tree, build, *mutant)
            bad += unnoticed is None or bool(unnoticed)
            if unnoticed is not None:
                print(f"{mutant[0]}: {'NOT NOTICED by ' + ', '.join(unnoticed) if unnoticed else 'noticed by ' + ', '.join(mutant[4])} ({time.monotonic() - start:.0f} s)", flush=True)
    print(f"{len(wanted)} mutants, {bad} to look at")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
