/*
 * Page states behind PhysMap (memory.h has the contract), by offset. Of memory/ alone.
 * Threading: windows and where pages are from, before vCPUs run; the rest from any thread.
 */
#ifndef DOPPEL_MEMORY_PAGES_H
#define DOPPEL_MEMORY_PAGES_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "memory/memory.h"
#include "memory/page_source.h"

#define PAGES_WINDOWS_MAX 32u

struct pages_window {
    uint8_t *at;
    int prot;
};

struct pages {
    pthread_mutex_t lock;
    pthread_cond_t arrived;
    int ram_fd, file_fd; /* file_fd: of shared pages, -1 without */
    uint64_t page_count;
    struct pages_window window[PAGES_WINDOWS_MAX]; /* the first is PhysMap's own; free ones have no address */
    /* A bit a page, NULL before there is anything but private pages. Bits of remote and shared go under the lock, when the page is ready for whoever sees it. */
    _Atomic uint64_t *remote, *shared, *touched;
    _Atomic uint64_t *guarded; /* not to be stored to through window `guarding`, under the lock */
    uint64_t *fetching;
    uint64_t remote_left, shared_left, islands, mappings_max;
    struct page_source source;
    unsigned guarding;
    bool has_source, failed;
    uint32_t vector_components; /* vector_save.h */
    void (*on_failure)(void *ctx, const char *text);
    void *failure_ctx;
};

void pages_init(struct pages *pages);
void pages_destroy(struct pages *pages);
/* RAM's mappings, over what is there; 0 or -errno. */
int pages_window_add(struct pages *pages, void *at, int prot);
void pages_window_remove(struct pages *pages, const void *at);

/* Takes the right to write from pages of a writable window, or gives it back; one window has such pages. */
int pages_guard(struct pages *pages, const void *at, uint64_t offset, uint64_t bytes, bool on);

int pages_share(struct pages *pages, int fd, struct error *err);
int pages_set_source(struct pages *pages, const struct page_source *source, const uint64_t *remote, struct error *err);

/* The pages of [offset, +bytes), inside RAM, ready for the intent. Preserves vector registers. */
int pages_need(struct pages *pages, uint64_t offset, uint64_t bytes, enum physmap_intent intent);
bool pages_are_private(const struct pages *pages, uint64_t offset, uint64_t bytes);
bool pages_are_remote(const struct pages *pages, uint64_t offset); /* the page */
/* Sets the bits of pages that are remote, or shared where the file has bytes. */
void pages_elsewhere(const struct pages *pages, uint64_t *bits);
void pages_touched(const struct pages *pages, uint64_t *bits);
/* Tells the host that these of the shared ones will be wanted from their file. */
void pages_advise(const struct pages *pages, const uint64_t *bits);
/* They become private without their bytes: holes of RAM's file. */
int pages_forget(struct pages *pages, uint64_t offset, uint64_t bytes);
int pages_fill(struct pages *pages, uint64_t offset, const void *data, uint64_t bytes);

#endif
