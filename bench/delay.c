/* delay NAMESPACE NAMESPACE DEVICE MICROSECONDS: a wire that takes its time.
 *
 * Makes the TUN device DEVICE in each of two network namespaces (paths such as /run/netns/a) and hands every packet
 * that one of them sends to the other, MICROSECONDS later and in order. It neither limits the rate nor drops: a queueing
 * discipline on the devices does that. Prints "up" once both are there, and ends when its standard input does, so that it
 * never outlives who started it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define PACKET 2048 /* bytes: the devices keep the usual MTU of 1500 */
#define PLACES 16384 /* packets on their way: 10 ms of 19 Gbit/s; beyond that the sender's queue has to hold them */
#define AT_ONCE 64 /* packets taken from one side before the other is looked at */

typedef struct {
    uint64_t due;
    int length;
    unsigned char bytes[PACKET];
} Packet;

typedef struct { /* one direction: a ring, oldest first */
    Packet *packets;
    unsigned first, count;
} Line;

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void must(int fine, const char *what) {
    if (!fine) {
        fprintf(stderr, "%s: %s\n", what, strerror(errno));
        exit(1);
    }
}

static int open_device(const char *space, const char *name) {
    int home = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC), there = open(space, O_RDONLY | O_CLOEXEC);
    must(home >= 0 && there >= 0, space);
    must(setns(there, CLONE_NEWNET) == 0, "setns");
    int device = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC);
    must(device >= 0, "/dev/net/tun");
    struct ifreq request = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    must(ioctl(device, TUNSETIFF, &request) == 0, "TUNSETIFF");
    must(setns(home, CLONE_NEWNET) == 0, "setns");
    close(there);
    close(home);
    return device;
}

/* Take what the device wants to send. */
static void take(int device, Line *line, uint64_t delay) {
    for (int i = 0; i < AT_ONCE && line->count < PLACES; i++) {
        Packet *packet = &line->packets[(line->first + line->count) % PLACES];
        ssize_t length = read(device, packet->bytes, PACKET);
        if (length <= 0)
            return;
        packet->length = (int)length;
        packet->due = now_ns() + delay;
        line->count++;
    }
}

/* Hand over what has been on its way for long enough; returns when the next packet is due, or 0. */
static uint64_t deliver(int device, Line *line) {
    while (line->count) {
        Packet *packet = &line->packets[line->first];
        if (packet->due > now_ns())
            return packet->due;
        if (write(device, packet->bytes, (size_t)packet->length) < 0 && errno == EAGAIN)
            return packet->due; /* the device is full: once more, at once */
        line->first = (line->first + 1) % PLACES;
        line->count--;
    }
    return 0;
}

int main(int count, char **words) {
    if (count != 5) {
        fprintf(stderr, "usage: delay NAMESPACE NAMESPACE DEVICE MICROSECONDS\n");
        return 2;
    }
    uint64_t delay = strtoull(words[4], NULL, 10) * 1000u;
    int devices[2] = {open_device(words[1], words[3]), open_device(words[2], words[3])};
    Line lines[2] = {{calloc(PLACES, sizeof(Packet)), 0, 0}, {calloc(PLACES, sizeof(Packet)), 0, 0}};
    must(lines[0].packets && lines[1].packets, "memory");
    prctl(PR_SET_TIMERSLACK, 1ul); /* else a wait ends up to 50 us late */
    printf("up\n");
    fflush(stdout);
    for (;;) {
        uint64_t next = 0;
        for (int i = 0; i < 2; i++) {
            uint64_t due = deliver(devices[1 - i], &lines[i]);
            next = due && (!next || due < next) ? due : next;
        }
        struct pollfd waits[3] = {{.fd = STDIN_FILENO, .events = POLLIN}};
        for (int i = 0; i < 2; i++) /* a negative descriptor is not looked at */
            waits[1 + i] = (struct pollfd){.fd = lines[i].count < PLACES ? devices[i] : -1, .events = POLLIN};
        uint64_t now = now_ns(), left = next > now ? next - now : 0;
        struct timespec limit = {.tv_sec = (time_t)(left / 1000000000u), .tv_nsec = (long)(left % 1000000000u)};
        if (ppoll(waits, 3, next ? &limit : NULL, NULL) < 0 && errno != EINTR)
            return 1;
        char rest[64];
        if (waits[0].revents && read(STDIN_FILENO, rest, sizeof rest) <= 0)
            return 0;
        for (int i = 0; i < 2; i++)
            if (waits[1 + i].revents & POLLIN)
                take(devices[i], &lines[i], delay);
    }
}
