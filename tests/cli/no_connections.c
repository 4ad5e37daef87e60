/* Refuses every connection to another machine and writes it down; loaded before the C library. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void tell(const char *what, const char *where) {
    FILE *log = fopen(getenv("CONNECTIONS_LOG"), "a");
    if (log) {
        fprintf(log, "%s %s\n", what, where);
        fclose(log);
    }
}

/* Whether an address is on another machine, and its text; sockets of files and pipes are not. */
static int away(const struct sockaddr *to, char text[64]) {
    if (to && to->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)to;
        inet_ntop(AF_INET, &in->sin_addr, text, 64);
        return strncmp(text, "127.", 4) != 0;
    }
    if (to && to->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in = (const void *)to;
        inet_ntop(AF_INET6, &in->sin6_addr, text, 64);
        return strcmp(text, "::1") != 0;
    }
    return 0;
}

static int refused(const char *what, const struct sockaddr *to) {
    char text[64];
    if (!away(to, text)) return 0;
    tell(what, text);
    errno = ENETUNREACH;
    return 1;
}

int connect(int fd, const struct sockaddr *to, socklen_t size) {
    return refused("connect", to) ? -1 : NEXT(connect)(fd, to, size);
}

ssize_t sendto(int fd, const void *data, size_t length, int flags, const struct sockaddr *to,
               socklen_t size) {
    return refused("sendto", to) ? -1 : NEXT(sendto)(fd, data, length, flags, to, size);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    return refused("sendmsg", message->msg_name) ? -1 : NEXT(sendmsg)(fd, message, flags);
}

int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints,
                struct addrinfo **found) {
    unsigned char address[16];
    if (name && strcmp(name, "localhost") && inet_pton(AF_INET, name, address) != 1 &&
        inet_pton(AF_INET6, name, address) != 1) {
        tell("getaddrinfo", name);
        return EAI_FAIL;
    }
    return NEXT(getaddrinfo)(name, service, hints, found);
}

struct hostent *gethostbyname(const char *name) {
    tell("gethostbyname", name);
    h_errno = NO_RECOVERY;
    return NULL;
}
