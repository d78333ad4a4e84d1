// A library to preload into a program that uses SQLite. It records what the
// program does to the files of one directory: opening, writing, truncating,
// syncing, unlinking and renaming, in order.
//
//	SHIM_DIR     the directory, as an absolute path without symbolic links
//	SHIM_LOG     the file to append the record to; unset: record nothing
//	SHIM_KILL    the number of the sync before which to kill the program; 0: never
//	SHIM_NOSYNC  if set, syncs do nothing and succeed
//
// An entry is a header and data, appended in a single write, so that the program
// can append entries of its own to the same file.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

struct header {
	int32_t kind; // a letter
	int32_t fd;
	int64_t n; // offset, size, flags or number of the sync
	int64_t len; // of the data
};

enum { MAXFD = 1 << 16 };

// The lock makes the order of the record that of the calls. Syncs happen without
// it, because writes go on during a sync and may not be part of it.
static pthread_mutex_t mu = PTHREAD_MUTEX_INITIALIZER;
static char ours[MAXFD]; // descriptors of files in the directory
static const char *dir;
static int logfd = -1;
static long syncs, killat;
static int nosync;

static void fail(const char *why) {
	dprintf(2, "shim: %s: %s\n", why, strerror(errno));
	_exit(3);
}

static void *next(const char *name) {
	void *f = dlsym(RTLD_NEXT, name);
	if (!f)
		fail(name);
	return f;
}

// REAL declares a pointer to the function that the program would have called.
#define REAL(type, name, ...) \
	static type (*real)(__VA_ARGS__); \
	if (!real) \
		real = next(name);

static void record(char kind, int fd, int64_t n, const void *data, size_t len) {
	if (logfd < 0)
		return;
	struct header h = {kind, fd, n, (int64_t)len};
	struct iovec v[2] = {{&h, sizeof h}, {(void *)data, len}};
	if (writev(logfd, v, 2) != (ssize_t)(sizeof h + len))
		fail("can't write the record");
}

__attribute__((constructor)) static void start(void) {
	dir = getenv("SHIM_DIR");
	nosync = getenv("SHIM_NOSYNC") != NULL;
	if (getenv("SHIM_KILL"))
		killat = atol(getenv("SHIM_KILL"));
	const char *log = getenv("SHIM_LOG");
	if (!dir || !log)
		return;
	REAL(int, "open", const char *, int, ...)
	logfd = real(log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
	if (logfd < 0)
		fail("can't open the record");
	record('P', -1, 0, NULL, 0);
}

// within reports whether a path is the directory or below it.
static int within(const char *path) {
	size_t n = dir && path ? strlen(dir) : 0;
	return n && strncmp(path, dir, n) == 0 && (path[n] == 0 || path[n] == '/');
}

static int known(int fd) { return fd >= 0 && fd < MAXFD && ours[fd]; }

// A call that the replay does not support would make the record useless.
static void unknown(int fd, const char *what) {
	if (known(fd)) {
		pthread_mutex_lock(&mu);
		record('X', fd, 0, what, strlen(what));
		pthread_mutex_unlock(&mu);
	}
}

#define OPEN(name) \
	int name(const char *path, int flags, ...) { \
		REAL(int, #name, const char *, int, ...) \
		va_list ap; \
		va_start(ap, flags); \
		int mode = va_arg(ap, int); \
		va_end(ap); \
		if (!within(path)) \
			return real(path, flags, mode); \
		pthread_mutex_lock(&mu); \
		int fd = real(path, flags, mode), e = errno; \
		if (fd >= MAXFD) \
			fail("too many files"); \
		if (fd >= 0) { \
			ours[fd] = 1; \
			record(strcmp(path, dir) ? 'O' : 'D', fd, flags, path, strlen(path)); \
		} \
		pthread_mutex_unlock(&mu); \
		errno = e; \
		return fd; \
	}
OPEN(open)
OPEN(open64)

int close(int fd) {
	REAL(int, "close", int)
	if (!known(fd))
		return real(fd);
	pthread_mutex_lock(&mu);
	ours[fd] = 0;
	record('C', fd, 0, NULL, 0);
	int r = real(fd), e = errno;
	pthread_mutex_unlock(&mu);
	errno = e;
	return r;
}

#define PWRITE(name, off_type) \
	ssize_t name(int fd, const void *data, size_t len, off_type off) { \
		REAL(ssize_t, #name, int, const void *, size_t, off_type) \
		if (!known(fd)) \
			return real(fd, data, len, off); \
		pthread_mutex_lock(&mu); \
		ssize_t n = real(fd, data, len, off); \
		int e = errno; \
		if (n > 0) \
			record('W', fd, off, data, n); \
		pthread_mutex_unlock(&mu); \
		errno = e; \
		return n; \
	}
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t write(int fd, const void *data, size_t len) {
	REAL(ssize_t, "write", int, const void *, size_t)
	if (!known(fd))
		return real(fd, data, len);
	pthread_mutex_lock(&mu);
	off_t off = lseek(fd, 0, SEEK_CUR);
	ssize_t n = real(fd, data, len);
	int e = errno;
	if (n > 0)
		record('W', fd, off, data, n);
	pthread_mutex_unlock(&mu);
	errno = e;
	return n;
}

#define FTRUNCATE(name, off_type) \
	int name(int fd, off_type size) { \
		REAL(int, #name, int, off_type) \
		if (!known(fd)) \
			return real(fd, size); \
		pthread_mutex_lock(&mu); \
		int r = real(fd, size), e = errno; \
		if (r == 0) \
			record('T', fd, size, NULL, 0); \
		pthread_mutex_unlock(&mu); \
		errno = e; \
		return r; \
	}
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

#define SYNC(name) \
	int name(int fd) { \
		REAL(int, #name, int) \
		if (!known(fd)) \
			return nosync ? 0 : real(fd); \
		pthread_mutex_lock(&mu); \
		long n = ++syncs; \
		record('S', fd, n, NULL, 0); \
		if (n == killat) \
			kill(getpid(), SIGKILL); \
		pthread_mutex_unlock(&mu); \
		if (nosync) \
			return 0; \
		int r = real(fd), e = errno; \
		pthread_mutex_lock(&mu); \
		if (r == 0) \
			record('E', fd, n, NULL, 0); \
		pthread_mutex_unlock(&mu); \
		errno = e; \
		return r; \
	}
SYNC(fsync)
SYNC(fdatasync)

int unlink(const char *path) {
	REAL(int, "unlink", const char *)
	if (!within(path))
		return real(path);
	pthread_mutex_lock(&mu);
	int r = real(path), e = errno;
	if (r == 0)
		record('U', -1, 0, path, strlen(path));
	pthread_mutex_unlock(&mu);
	errno = e;
	return r;
}

int rename(const char *from, const char *to) {
	REAL(int, "rename", const char *, const char *)
	if (!within(from) && !within(to))
		return real(from, to);
	char both[2 * PATH_MAX];
	int len = snprintf(both, sizeof both, "%s%c%s", from, 0, to);
	pthread_mutex_lock(&mu);
	int r = real(from, to), e = errno;
	if (r == 0)
		record('R', -1, 0, both, len);
	pthread_mutex_unlock(&mu);
	errno = e;
	return r;
}

ssize_t writev(int fd, const struct iovec *v, int n) {
	REAL(ssize_t, "writev", int, const struct iovec *, int)
	unknown(fd, "writev");
	return real(fd, v, n);
}

int fallocate(int fd, int mode, off_t off, off_t len) {
	REAL(int, "fallocate", int, int, off_t, off_t)
	unknown(fd, "fallocate");
	return real(fd, mode, off, len);
}

int posix_fallocate(int fd, off_t off, off_t len) {
	REAL(int, "posix_fallocate", int, off_t, off_t)
	unknown(fd, "posix_fallocate");
	return real(fd, off, len);
}
