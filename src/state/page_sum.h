/*
 * The checksum of a raw memory file (docs/formats.md), kept while its pages are written in any order, some of them several times: XXH3 (128 bits) of the pages' XXH3 (64 bits, little
 * endian; 0 for a page of zeroes), in their order. Costs 8 bytes a page meanwhile.
 * Threading: none.
 */
#ifndef DOPPEL_STATE_PAGE_SUM_H
#define DOPPEL_STATE_PAGE_SUM_H

#include <stddef.h>
#include <stdint.h>

#include "util/error.h"

#define PAGE_SUM_BYTES 4096u
#define PAGE_SUM_TEXT_BYTES 33 /* hexadecimal, with its end */

struct page_sum;

struct page_sum *page_sum_create(uint64_t size_bytes); /* of zeroes. NULL: no memory */
void page_sum_destroy(struct page_sum *sum);           /* NULL: nothing */
/* What the page is now. `page` is below size_bytes / PAGE_SUM_BYTES, rounded up. */
void page_sum_put(struct page_sum *sum, uint64_t page, const uint8_t *data);
void page_sum_text(const struct page_sum *sum, char text[PAGE_SUM_TEXT_BYTES]);

/* Of a whole file of so many bytes; holes are not read. The last page is filled up with zeroes. 0 or an error that names `path`; -EBADMSG: it is shorter. */
int page_sum_file(int fd, const char *path, uint64_t size_bytes, char text[PAGE_SUM_TEXT_BYTES], struct error *err) __attribute__((warn_unused_result));
/* XXH3 (128 bits) of bytes in memory, as such a text. */
void page_sum_bytes(const void *data, size_t size_bytes, char text[PAGE_SUM_TEXT_BYTES]);

#endif
