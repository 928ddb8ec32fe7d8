/* Libraries that are loaded when they are needed (library.h). */
#include "util/library.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static int load(struct library *library, struct error *err)
{
    void *handle = dlopen(library->file, RTLD_LAZY | RTLD_LOCAL);
    if (!handle)
        return error_set(err, -ENOENT, "%s is needed (package %s): %s", library->file, library->package, dlerror());
    for (size_t i = 0; i < library->count; i++) {
        void *at = dlsym(handle, library->name[i].name);
        if (!at)
            return error_set(err, -ENOENT, "%s is too old: %s", library->file, dlerror());
        *(void **)((char *)library->table + library->name[i].offset) = at;
    }
    return 0;
}

int library_load(struct library *library, struct error *err)
{
    pthread_mutex_lock(&lock);
    if (!library->tried)
        (void)load(library, &library->why_not);
    library->tried = true;
    pthread_mutex_unlock(&lock);
    return library->why_not.code ? error_set(err, library->why_not.code, "%s", library->why_not.text) : 0;
}

static void *load_main(void *arg)
{
    (void)!library_load(arg, NULL); /* who needs it asks again */
    return NULL;
}

void library_load_ahead(struct library *library)
{
    pthread_t thread;
    if (pthread_create(&thread, NULL, load_main, library) == 0)
        pthread_detach(thread);
}
