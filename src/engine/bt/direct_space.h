/*
 * A shadow of one guest address space as user code sees it: which pages of a direct_child (direct_child.h) are mapped, and how.
 *
 * Like a TLB it may keep what the guest's tables no longer say until the guest invalidates it, and it holds pages only with the rights for which no accessed or dirty bit is left to
 * set. A page with translations (BT_CODE_PRESENT) is never writable here.
 * Threading: the vCPU's thread, but for direct_space_release; functions that change mappings want e->lock.
 */
#ifndef DOPPEL_ENGINE_BT_DIRECT_SPACE_H
#define DOPPEL_ENGINE_BT_DIRECT_SPACE_H

#include "engine/bt/bt_priv.h"
#include "engine/bt/direct_child.h"

enum direct_fill {
    DIRECT_FILL_CHANGED, /* mapped now, or with more rights than before */
    DIRECT_FILL_SAME,    /* was mapped so already */
    DIRECT_FILL_NOT,     /* the guest's tables forbid it, it is not RAM, or the host cannot */
    DIRECT_FILL_FORBIDDEN, /* the page has more instructions that must not run here, RDPID and the like, than can be stopped before; or it is a file's, of persistent memory */
};

struct direct_space;

/* For the address space whose CR3 has the root `root`. */
int direct_space_create(struct direct_space **space, struct bt_engine *e, struct error *err) __attribute__((warn_unused_result));
void direct_space_destroy(struct direct_space *space); /* not with e->lock held */
/* As just made, for another guest process. -errno: of no more use. Not with e->lock held. */
int direct_space_reset(struct direct_space *space) __attribute__((warn_unused_result));
struct direct_child *direct_space_child(struct direct_space *space);

/* What the guest invalidates: everything; the page of gva. Done when it next runs. */
void direct_space_stale(struct direct_space *space);
void direct_space_stale_page(struct direct_space *space, gva_t gva);
/* The page will be wanted: mapped on the next way in when the guest's tables allow it by then. */
void direct_space_want(struct direct_space *space, gva_t gva);

/* On the way in, with CR3 loaded: catches up with the guest. False: cannot be used any more. From here to direct_space_left no page that is writable here is translated. */
bool direct_space_enter(struct direct_space *space, struct bt_vcpu *b);
void direct_space_left(struct direct_space *space);
/* Tells the process what has changed since. -errno: cannot be used any more. */
int direct_space_flush(struct direct_space *space) __attribute__((warn_unused_result));
/* For a fault, while entered: user access PAGING_READ, PAGING_WRITE or PAGING_FETCH to gva. */
enum direct_fill direct_space_fill(struct direct_space *space, struct bt_vcpu *b, gva_t gva, unsigned access);
/* Any thread, e->lock held: the RAM page is about to be translated. False: a process may be writing to it now. */
bool direct_space_release(struct direct_space *space, uint64_t ram_offset);

#endif
