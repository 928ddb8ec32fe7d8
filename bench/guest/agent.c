/*
 * Runs one workload at a time and times it. The same static program is the guest's init (process 1, on the serial console) and the native
 * runner on the host, so that both sides do the same system calls around a workload.
 *
 *   agent ROOT      natively: programs are under ROOT, commands on stdin, answers on stdout, the working directory is the caller's
 *   /init           in the guest: mounts, then the same on the console with ROOT "" and the working directory /bench
 *
 * Protocol, a line each way. Words are separated by tabs:
 *   run COPIES PROGRAM ARGUMENT...   ->  @done NANOSECONDS TOTAL STATUS BYTES HASH TEXT
 *   off                              ->  powers off (guest) or ends
 * PROGRAM "./x" is static and started as it is, "usr/x" by the dynamic loader under ROOT. COPIES of it run at the same time. The time is from before
 * the first starts until the last has ended (CLOCK_MONOTONIC); TOTAL is up to the answer, what the one who asked should see. HASH (FNV-1a) and BYTES are of everything written to stdout, TEXT is its last line, or
 * the last of stderr when STATUS is not 0. Between commands the agent sleeps in read().
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <inttypes.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define WORDS_MAX 64
#define COPIES_MAX 8
#define TEXT_BYTES 160

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* The last line of the file, printable, in `text`; hash and size of it all. */
static uint64_t hash_file(const char *path, uint64_t *bytes, char text[TEXT_BYTES])
{
    static unsigned char buffer[65536];
    uint64_t hash = 0xcbf29ce484222325u;
    size_t length = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    bool line_ended = false;
    *bytes = 0;
    for (ssize_t n; (n = read(fd, buffer, sizeof buffer)) > 0; *bytes += (uint64_t)n) {
        for (ssize_t i = 0; i < n; i++) {
            hash = (hash ^ buffer[i]) * 0x100000001b3u;
            if (buffer[i] == '\n') {
                line_ended = true;
                continue;
            }
            if (line_ended)
                length = 0;
            line_ended = false;
            if (length < TEXT_BYTES - 1)
                text[length++] = buffer[i] >= 32 && buffer[i] < 127 ? (char)buffer[i] : '?';
        }
    }
    text[length] = 0;
    if (fd >= 0)
        close(fd);
    return hash;
}

static pid_t start(const char *root, char **words, unsigned copy)
{
    char loader[512], libraries[512], program[512], out[32];
    char *argv[WORDS_MAX + 4];
    unsigned n = 0;
    if (words[0][0] != '.') {
        snprintf(loader, sizeof loader, "%s/usr/lib64/ld-linux-x86-64.so.2", root);
        snprintf(libraries, sizeof libraries, "%s/usr/lib/x86_64-linux-gnu", root);
        snprintf(program, sizeof program, "%s/%s", root, words[0]);
        argv[n++] = loader;
        argv[n++] = "--library-path";
        argv[n++] = libraries;
        argv[n++] = program;
    } else {
        argv[n++] = words[0];
    }
    for (unsigned i = 1; words[i]; i++)
        argv[n++] = words[i];
    argv[n] = NULL;

    snprintf(out, sizeof out, "out.%u", copy);
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&files, 1, out, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    posix_spawn_file_actions_addopen(&files, 2, "err", O_WRONLY | O_CREAT | O_APPEND, 0644);
    pid_t pid = -1;
    int r = posix_spawn(&pid, argv[0], &files, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&files);
    return r ? -1 : pid;
}

static void run(const char *root, char **words, FILE *answer)
{
    static const char *const stale[] = {"err", "scratch.db", "scratch.db-journal", "out.0", "out.1", "out.2", "out.3", "out.4", "out.5", "out.6", "out.7"};
    unsigned copies = words[0] ? (unsigned)atoi(words[0]) : 0;
    if (copies < 1 || copies > COPIES_MAX || !words[1]) {
        fprintf(answer, "@done 0 0 255 0 0000000000000000 what?\n");
        return;
    }
    for (size_t i = 0; i < sizeof stale / sizeof *stale; i++)
        unlink(stale[i]);

    pid_t pid[COPIES_MAX];
    int worst = 0;
    uint64_t began = now_ns();
    for (unsigned i = 0; i < copies; i++)
        pid[i] = start(root, words + 1, i);
    for (unsigned i = 0; i < copies; i++) {
        int status = 127 << 8;
        if (pid[i] > 0 && waitpid(pid[i], &status, 0) < 0)
            status = 126 << 8;
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        worst = code > worst ? code : worst;
    }
    uint64_t spent = now_ns() - began, bytes = 0, ignored;
    char text[TEXT_BYTES] = "";
    uint64_t hash = hash_file("out.0", &bytes, text);
    for (unsigned i = 1; i < copies; i++) {
        char other[32], unused[TEXT_BYTES];
        snprintf(other, sizeof other, "out.%u", i);
        if (hash_file(other, &ignored, unused) != hash)
            worst = worst ? worst : 254; /* copies of one program disagree */
    }
    if (worst)
        hash_file("err", &ignored, text);
    fprintf(answer, "@done %" PRIu64 " %" PRIu64 " %d %" PRIu64 " %016" PRIx64 " %s\n", spent, now_ns() - began, worst, bytes,
            hash, text);
}

static void set_up_guest(void)
{
    mkdir("/dev", 0755);
    mkdir("/proc", 0755);
    mkdir("/tmp", 01777);
    mount("dev", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("tmp", "/tmp", "tmpfs", 0, NULL);
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd >= 0) {
        dup2(fd, 0);
        dup2(fd, 1);
        dup2(fd, 2);
    }
    struct termios tty;
    if (tcgetattr(0, &tty) == 0) {
        cfmakeraw(&tty);
        tcsetattr(0, TCSANOW, &tty);
    }
    if (chdir("/bench"))
        printf("no /bench\n");
}

int main(int argc, char **argv)
{
    bool is_init = getpid() == 1;
    const char *root = argc > 1 && !is_init ? argv[1] : "";
    if (is_init)
        set_up_guest();
    /* One environment on both sides, whatever the kernel or the caller gave. */
    char home[512];
    clearenv();
    setenv("PATH", "/usr/bin:/bin", 1);
    setenv("LC_ALL", "C", 1);
    setenv("PYTHONDONTWRITEBYTECODE", "1", 1);
    setenv("PYTHONHASHSEED", "0", 1);
    snprintf(home, sizeof home, "%s/usr", root);
    setenv("PYTHONHOME", home, 1);

    static char line[8192];
    printf("@ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        char *words[WORDS_MAX + 1];
        unsigned n = 0;
        line[strcspn(line, "\r\n")] = 0;
        for (char *rest = line, *word; n < WORDS_MAX && (word = strsep(&rest, "\t"));)
            words[n++] = word;
        words[n] = NULL;
        if (n && strcmp(words[0], "off") == 0)
            break;
        if (n && strcmp(words[0], "run") == 0)
            run(root, words + 1, stdout);
        fflush(stdout);
    }
    if (is_init) {
        reboot(RB_POWER_OFF);
        for (;;)
            pause();
    }
    return 0;
}
