/*
 * Numbered objects. A number is sequence << FS_SLOT_BITS | index: indices are used again, numbers are not, so that one which the guest gave back
 * never names another object. Index 0 stays empty. Root's number, FUSE_ROOT_ID, is index 1 of sequence 0.
 * Threading: the caller's lock.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "fs/fs_priv.h"

#define INDEX_MASK ((1u << FS_SLOT_BITS) - 1)
#define CAPACITY_FIRST 64u

static int grow(struct fs_slots *slots, uint32_t wanted)
{
    uint32_t capacity = slots->capacity ? slots->capacity : CAPACITY_FIRST;
    uint64_t **item;
    uint32_t *list;

    while (capacity <= wanted)
        capacity *= 2;
    item = realloc(slots->item, capacity * sizeof(*item));
    if (!item)
        return -ENOMEM;
    slots->item = item;
    list = realloc(slots->free, capacity * sizeof(*list));
    if (!list)
        return -ENOMEM;
    slots->free = list;
    memset(item + slots->capacity, 0, (capacity - slots->capacity) * sizeof(*item));
    for (uint32_t i = capacity; i-- > (slots->capacity ? slots->capacity : 1);)
        slots->free[slots->free_count++] = i;
    slots->capacity = capacity;
    return 0;
}

int fs_slots_add(struct fs_slots *slots, uint64_t *object)
{
    uint32_t index;

    if (slots->free_count == 0) {
        if (slots->capacity > INDEX_MASK)
            return -ENFILE;
        if (grow(slots, slots->capacity) < 0)
            return -ENOMEM;
    }
    index = slots->free[--slots->free_count];
    slots->item[index] = object;
    *object = slots->sequence++ << FS_SLOT_BITS | index;
    return 0;
}

int fs_slots_add_as(struct fs_slots *slots, uint64_t *object, uint64_t id)
{
    uint32_t index = id & INDEX_MASK;

    if (index == 0)
        return -EINVAL;
    if (index >= slots->capacity && grow(slots, index) < 0)
        return -ENOMEM;
    if (slots->item[index])
        return -EEXIST;
    slots->item[index] = object;
    *object = id;
    if (slots->sequence <= id >> FS_SLOT_BITS)
        slots->sequence = (id >> FS_SLOT_BITS) + 1;
    return 0;
}

void fs_slots_settle(struct fs_slots *slots)
{
    slots->free_count = 0;
    for (uint32_t i = slots->capacity; i-- > 1;) {
        if (!slots->item[i])
            slots->free[slots->free_count++] = i;
    }
}

void *fs_slots_find(const struct fs_slots *slots, uint64_t id)
{
    uint32_t index = id & INDEX_MASK;

    if (index >= slots->capacity || !slots->item[index] || *slots->item[index] != id)
        return NULL;
    return slots->item[index];
}

void fs_slots_remove(struct fs_slots *slots, uint64_t id)
{
    uint32_t index = id & INDEX_MASK;

    slots->item[index] = NULL;
    slots->free[slots->free_count++] = index;
}

void fs_slots_clear(struct fs_slots *slots)
{
    free(slots->item);
    free(slots->free);
    *slots = (struct fs_slots){0};
}
