/* The file server's messages on a thread of kind IN_SHARE. */
#include "filtered.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#include "fs/fs.h"

int __real_fs_create(struct fs **fs, const struct fs_config *config, struct error *err);
int __wrap_fs_create(struct fs **fs, const struct fs_config *config, struct error *err);

uint64_t __real_fs_serve(struct fs *fs, const struct fs_message *message);
uint64_t __wrap_fs_serve(struct fs *fs, const struct fs_message *message);

struct service {
    struct fs *fs;
    const struct fs_message *message;
    uint64_t result;
};

static void run_serve(void *ctx)
{
    struct service *service = ctx;
    service->result = __real_fs_serve(service->fs, service->message);
}

uint64_t __wrap_fs_serve(struct fs *fs, const struct fs_message *message)
{
    struct service service = {fs, message, 0};
    filtered_call(IN_SHARE, run_serve, &service);
    return service.result;
}

/* As the sandbox has it. */
int __wrap_fs_create(struct fs **fs, const struct fs_config *config, struct error *err)
{
    struct fs_config without = *config;
    without.no_capabilities = true;
    return __real_fs_create(fs, &without, err);
}

__attribute__((constructor)) static void skip_privileged(void)
{
    cmocka_set_skip_filter("test_privileged");
}
