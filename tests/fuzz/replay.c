/*
 * A plain main for fuzz targets: runs LLVMFuzzerTestOneInput over files, or over each file of a directory, so that the corpora are
 * replayed by every test run, without a fuzzer. With -m N each input is also run N times with a few bytes changed, always the same ones.
 *
 *     fuzz_x_replay [-m N] FILE|DIRECTORY...
 */
#include <dirent.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define INPUT_BYTES_MAX (1l << 20)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static uint64_t next_random(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

/* Changes up to eight bytes, most of them near the front where headers are, and sometimes the length. */
static size_t mutate(uint8_t *data, size_t size, uint64_t *seed)
{
    static const uint8_t interesting[] = {0x00, 0x01, 0x7F, 0x80, 0xFE, 0xFF};
    unsigned changes = 1 + next_random(seed) % 8;

    while (size && changes--) {
        size_t reach = next_random(seed) % 4 && size > 1024 ? 1024 : size;
        uint8_t *byte = &data[next_random(seed) % reach];

        switch (next_random(seed) % 3) {
        case 0: *byte = (uint8_t)next_random(seed); break;
        case 1: *byte ^= (uint8_t)(1u << next_random(seed) % 8); break;
        default: *byte = interesting[next_random(seed) % sizeof(interesting)];
        }
    }
    return next_random(seed) % 8 || !size ? size : next_random(seed) % size;
}

/* Each run gets a block of its own of exactly the input's size, so that a sanitizer sees reads past its end. */
static int run_once(const uint8_t *data, size_t size)
{
    uint8_t *copy = malloc(size ? size : 1);

    if (!copy)
        return -1;
    memcpy(copy, data, size);
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
    return 0;
}

static int run_file(const char *path, unsigned long mutations)
{
    uint64_t seed = 0x9E3779B97F4A7C15ull;
    uint8_t *data = malloc(INPUT_BYTES_MAX), *changed = malloc(INPUT_BYTES_MAX);
    FILE *file = fopen(path, "rb");
    int rc = -1;

    if (data && changed && file) {
        size_t size = fread(data, 1, INPUT_BYTES_MAX, file);

        rc = run_once(data, size);
        for (unsigned long i = 0; rc == 0 && i < mutations; i++) {
            memcpy(changed, data, size);
            rc = run_once(changed, mutate(changed, size, &seed));
        }
    }
    if (rc < 0)
        fprintf(stderr, "cannot run %s\n", path);
    if (file)
        fclose(file);
    free(data);
    free(changed);
    return rc;
}

static int run_directory(const char *path, unsigned long mutations, unsigned *count)
{
    struct dirent **entries;
    int found = scandir(path, &entries, NULL, alphasort), rc = found < 0 ? -1 : 0;

    for (int i = 0; i < found; i++) {
        char file[4096];

        snprintf(file, sizeof(file), "%s/%s", path, entries[i]->d_name);
        if (entries[i]->d_name[0] != '.' && rc == 0) {
            rc = run_file(file, mutations);
            (*count)++;
        }
        free(entries[i]);
    }
    if (found >= 0)
        free(entries);
    else
        perror(path);
    return rc;
}

int main(int argc, char **argv)
{
    unsigned long mutations = 0;
    unsigned count = 0;
    int first = 1, rc = 0;

    if (argc > 2 && strcmp(argv[1], "-m") == 0) {
        mutations = strtoul(argv[2], NULL, 10);
        first = 3;
    }
    for (int i = first; i < argc && rc == 0; i++) {
        struct stat st;

        if (stat(argv[i], &st) == 0 && S_ISDIR(st.st_mode)) {
            rc = run_directory(argv[i], mutations, &count);
        } else {
            rc = run_file(argv[i], mutations);
            count++;
        }
    }
    printf("%u inputs, %lu changed copies of each\n", count, mutations);
    return rc == 0 && count ? 0 : 1;
}
