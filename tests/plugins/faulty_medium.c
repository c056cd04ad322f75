/* A medium that fails while a switch is on: preloaded, it answers for the files of one folder.
 *
 *   KVBM_FAULTY_FOLDER  files whose path begins so
 *   KVBM_FAULTY_SWITCH  a file of one byte, read at each call:
 *                         R  reads fail with EIO         E  both fail with EIO
 *                         W  writes fail with EIO        S  writes fail with ENOSPC
 *                         H  both hang until it is turned
 *
 *   cc -shared -fPIC -o faulty_medium.so faulty_medium.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

enum { READ = 1, WRITE = 2 };

static char mode(void) {
    static volatile char *byte;
    if (!byte) {
        const char *name = getenv("KVBM_FAULTY_SWITCH");
        int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
        int fd = name ? real_open(name, O_RDONLY | O_CLOEXEC) : -1;
        void *page = fd < 0 ? MAP_FAILED : mmap(NULL, 1, PROT_READ, MAP_SHARED, fd, 0);
        if (fd >= 0) close(fd);
        static char none = '-';
        byte = page == MAP_FAILED ? &none : page;
    }
    return *byte;
}

static int error_of(int fd, int kind) {
    char now = mode(), link[64], path[4096];
    int error = now == 'S' ? (kind & WRITE ? ENOSPC : 0)
              : now == 'E' ? EIO
              : now == 'R' ? (kind & READ ? EIO : 0)
              : now == 'W' ? (kind & WRITE ? EIO : 0) : 0;
    const char *folder = getenv("KVBM_FAULTY_FOLDER");
    if ((!error && now != 'H') || !folder) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (strncmp(path, folder, strlen(folder))) return 0;
    while (mode() == 'H') usleep(1000);
    return error;
}

#define CALL(type, name, kind, parameters, arguments)                          \
    type name parameters {                                                     \
        static type(*real) parameters;                                         \
        if (!real) real = dlsym(RTLD_NEXT, #name);                             \
        int error = error_of(fd, kind);                                        \
        if (error) { errno = error; return -1; }                               \
        return real arguments;                                                 \
    }

CALL(ssize_t, read, READ, (int fd, void *to, size_t n), (fd, to, n))
CALL(ssize_t, pread, READ, (int fd, void *to, size_t n, off_t at), (fd, to, n, at))
CALL(ssize_t, pread64, READ, (int fd, void *to, size_t n, off64_t at), (fd, to, n, at))
CALL(ssize_t, readv, READ, (int fd, const struct iovec *v, int n), (fd, v, n))
CALL(ssize_t, preadv, READ, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))
CALL(ssize_t, preadv64, READ, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at))
CALL(ssize_t, preadv2, READ, (int fd, const struct iovec *v, int n, off_t at, int f), (fd, v, n, at, f))
CALL(ssize_t, preadv64v2, READ, (int fd, const struct iovec *v, int n, off64_t at, int f), (fd, v, n, at, f))
CALL(ssize_t, write, WRITE, (int fd, const void *from, size_t n), (fd, from, n))
CALL(ssize_t, pwrite, WRITE, (int fd, const void *from, size_t n, off_t at), (fd, from, n, at))
CALL(ssize_t, pwrite64, WRITE, (int fd, const void *from, size_t n, off64_t at), (fd, from, n, at))
CALL(ssize_t, writev, WRITE, (int fd, const struct iovec *v, int n), (fd, v, n))
CALL(ssize_t, pwritev, WRITE, (int fd, const struct iovec *v, int n, off_t at), (fd, v, n, at))
CALL(ssize_t, pwritev64, WRITE, (int fd, const struct iovec *v, int n, off64_t at), (fd, v, n, at))
CALL(ssize_t, pwritev2, WRITE, (int fd, const struct iovec *v, int n, off_t at, int f), (fd, v, n, at, f))
CALL(ssize_t, pwritev64v2, WRITE, (int fd, const struct iovec *v, int n, off64_t at, int f), (fd, v, n, at, f))
CALL(int, fallocate, WRITE, (int fd, int how, off_t at, off_t n), (fd, how, at, n))
CALL(int, fallocate64, WRITE, (int fd, int how, off64_t at, off64_t n), (fd, how, at, n))
CALL(int, ftruncate, WRITE, (int fd, off_t n), (fd, n))
CALL(int, ftruncate64, WRITE, (int fd, off64_t n), (fd, n))
CALL(int, fsync, WRITE, (int fd), (fd))
CALL(int, fdatasync, WRITE, (int fd), (fd))

int posix_fallocate(int fd, off_t at, off_t n) {
    static int (*real)(int, off_t, off_t);
    if (!real) real = dlsym(RTLD_NEXT, "posix_fallocate");
    int error = error_of(fd, WRITE);
    return error ? error : real(fd, at, n);
}

int posix_fallocate64(int fd, off64_t at, off64_t n) {
    static int (*real)(int, off64_t, off64_t);
    if (!real) real = dlsym(RTLD_NEXT, "posix_fallocate64");
    int error = error_of(fd, WRITE);
    return error ? error : real(fd, at, n);
}
