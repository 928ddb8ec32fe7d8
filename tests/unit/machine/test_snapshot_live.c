/* Snapshots of a guest that goes on computing: whole ones and layers of what it wrote since, compressed, encrypted or raw; each is gone on with, and computes the same. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>

#include "computing_guest.h"

#define LAYERS 5u

static struct chunk_secret secret;

/* Files of one snapshot each, in memory; named as this process's others can open them. */
struct layer {
    int state, memory;
    char state_path[64], memory_path[64];
    struct chunk_id id;
};

static void layer_make(struct layer *layer)
{
    layer->state = memfd_create("state", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    layer->memory = memfd_create("memory", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    assert_true(layer->state >= 0 && layer->memory >= 0);
    snprintf(layer->state_path, sizeof layer->state_path, "/proc/self/fd/%d", layer->state);
    snprintf(layer->memory_path, sizeof layer->memory_path, "/proc/self/fd/%d", layer->memory);
}

static void layer_close(struct layer *layer)
{
    close(layer->state);
    close(layer->memory);
}

static int save(struct machine *machine, struct layer *layer, const struct layer *below, int zstd_level, bool encrypted, struct machine_snapshot *out, struct error *err)
{
    *out = (struct machine_snapshot){.state_fd = layer->state, .memory_fd = layer->memory, .state_name = "the state", .memory_name = "the memory", .layer = below != NULL,
                                     .zstd_level = zstd_level, .secret = encrypted ? &secret : NULL, .threads = 2, .sums = true};
    if (below)
        out->parent = below->id;
    int r = machine_snapshot_live(machine, out, err);
    layer->id = out->id;
    bool raw = !below && !zstd_level && !encrypted;
    char sum[PAGE_SUM_TEXT_BYTES];
    assert_int_equal(out->memory_sum[0] != 0, r == 0 && raw);
    if (r == 0 && raw) { /* whatever the guest wrote meanwhile */
        must(page_sum_file(layer->memory, "memory", out->memory_bytes, sum, err), err);
        assert_string_equal(sum, out->memory_sum);
    }
    return r;
}

/* Goes on from layer number `top`, those below it down to number 0 included. */
static int load(struct machine **machine, struct machine_config *config, const struct layer *layers, unsigned top, const struct chunk_secret *key, const char *engine, struct error *err)
{
    const char *below[LAYERS];
    struct snapshot_files files = {.state = layers[top].state_path, .memory = layers[top].memory_path, .below = below, .below_count = top, .secret = key};
    for (unsigned i = 0; i < top; i++)
        below[i] = layers[top - 1 - i].memory_path;
    machine_config_init(config);
    int r = machine_snapshot_config(&files, config, err);
    if (r)
        return r;
    set(config, "engine", usable(engine));
    return machine_snapshot_load(machine, config, &files, err);
}

static void goes_on(const struct files *f, const struct layer *layers, unsigned top, const char *engine)
{
    struct machine *machine = NULL;
    struct machine_config config;
    struct error err = {0};
    must(load(&machine, &config, layers, top, &secret, engine, &err), &err);
    must(machine_start(machine, &err), &err);
    assert_int_equal(machine_wait(machine), MACHINE_SHUTDOWN);
    machine_destroy(machine);
    machine_config_clear(&config);
    assert_int_equal(result(f), expected());
}

static void must_not_load(const struct layer *layers, unsigned top, const struct chunk_secret *key, int code, const char *word)
{
    struct machine *machine = NULL;
    struct machine_config config;
    struct error err = {0};
    assert_int_equal(load(&machine, &config, layers, top, key, "interp", &err), code);
    if (!strstr(err.text, word))
        fail_msg("%s", err.text);
    machine_config_clear(&config);
}

static struct machine *start(struct files *f, struct machine_config *config, const char *engine)
{
    struct machine *machine = NULL;
    struct error err = {0};
    files_make(f);
    make_config(config, f, usable(engine));
    must(machine_create(&machine, config, &err), &err);
    must(machine_start(machine, &err), &err);
    run_for_ms(5);
    return machine;
}

static void layers(void **state)
{
    struct files f;
    struct machine_config config;
    struct machine_snapshot made;
    struct layer layer[LAYERS];
    struct error err = {0};
    struct machine *machine = start(&f, &config, "bt");
    for (unsigned i = 0; i < LAYERS; i++) {
        layer_make(&layer[i]);
        run_for_ms(2);
        must(save(machine, &layer[i], i ? &layer[i - 1] : NULL, i == 2 || i == 3, i >= 3, &made, &err), &err);
        assert_int_equal(made.has_parent, i > 0);
        assert_true(made.pages >= 1 && made.rounds >= 1 && made.memory_bytes > 0 && made.state_bytes > 0);
    }
    machine_destroy(machine);
    machine_config_clear(&config);
    for (unsigned top = 0; top < LAYERS; top++)
        goes_on(&f, layer, top, top == 2 ? "interp" : "bt");
    struct chunk_secret other = {.size_bytes = 5, .data = "other"};
    must_not_load(layer, 3, NULL, -ENOKEY, "encrypted");
    must_not_load(layer, 4, &other, -EKEYREJECTED, "another key");
    must_not_load(layer + 1, 0, &secret, -EINVAL, "needed"); /* a layer upon nothing */
    struct layer wrong[2] = {layer[1], layer[3]};
    must_not_load(wrong, 1, &secret, -EINVAL, "lies upon");
    struct layer twice[2] = {layer[0], layer[0]};
    must_not_load(twice, 1, &secret, -EINVAL, "whole");
    for (unsigned i = 0; i < LAYERS; i++)
        layer_close(&layer[i]);
    files_remove(&f);
}

/* Whole, wrapped in every way, by a machine that was loaded itself. */
static void whole(void **state)
{
    struct files f;
    struct machine_config config, again;
    struct machine_snapshot made;
    struct layer first, second[2];
    struct error err = {0};
    struct machine *machine = start(&f, &config, "interp");
    layer_make(&first);
    layer_make(&second[0]);
    layer_make(&second[1]);
    must(save(machine, &first, NULL, 3, true, &made, &err), &err);
    machine_destroy(machine);
    must(load(&machine, &again, &first, 0, &secret, "bt", &err), &err);
    must(machine_start(machine, &err), &err);
    must(machine_pause(machine, &err), &err);
    must(save(machine, &second[0], NULL, 0, false, &made, &err), &err);
    assert_true(made.has_parent);
    assert_memory_equal(&made.parent, &first.id, sizeof first.id);
    must(save(machine, &second[1], &second[0], 0, false, &made, &err), &err); /* paused: nothing changed */
    assert_int_equal(made.pages, 0);
    machine_destroy(machine);
    goes_on(&f, second, 1, "bt");
    machine_config_clear(&again);
    machine_config_clear(&config);
    layer_close(&first);
    layer_close(&second[0]);
    layer_close(&second[1]);
    files_remove(&f);
}

/* What a snapshot that failed would have had is in the next one; one upon another than the last is refused. */
static void failure(void **state)
{
    struct files f;
    struct machine_config config;
    struct machine_snapshot made;
    struct layer layer[2], bad;
    struct error err = {0};
    struct machine *machine = start(&f, &config, "bt");
    layer_make(&layer[0]);
    must(save(machine, &layer[0], NULL, 0, false, &made, &err), &err);
    for (int zstd = 0; zstd < 2; zstd++) {
        layer_make(&bad);
        run_for_ms(2);
        assert_int_equal(ftruncate(bad.memory, 64), 0);
        assert_int_equal(fcntl(bad.memory, F_ADD_SEALS, F_SEAL_GROW), 0); /* a full disk */
        assert_true(save(machine, &bad, &layer[0], zstd, false, &made, &err) < 0);
        assert_non_null(strstr(err.text, "cannot write the memory"));
        layer_close(&bad);
    }
    layer_make(&layer[1]);
    bad = layer[1];
    assert_int_equal(save(machine, &layer[1], &bad, 0, false, &made, &err), -ESTALE);
    must(save(machine, &layer[1], &layer[0], 0, false, &made, &err), &err);
    machine_destroy(machine);
    goes_on(&f, layer, 1, "bt");
    machine_config_clear(&config);
    layer_close(&layer[0]);
    layer_close(&layer[1]);
    files_remove(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(layers), cmocka_unit_test(whole), cmocka_unit_test(failure)};
    assert_int_equal(chunk_secret_set(&secret, "0123456789abcdef0123456789abcdef", 32), 0);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
