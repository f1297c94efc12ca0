/*
 * Traffic in bursts, all of it on one CPU, and how long each burst took.
 *
 *   traffic forward CPU BURSTS SIZE LINK MAC DESTINATION FLOWS   frames out of LINK, of 60 bytes (IPv4) or 62 (IPv6)
 *   traffic udp     CPU BURSTS SIZE SOURCE DESTINATION           datagrams of 18 bytes from a connected socket
 *   traffic tcp-rr  CPU BURSTS SIZE SOURCE DESTINATION NETNS     a byte there and a byte back over one connection
 *   traffic tcp     CPU BURSTS SIZE SOURCE DESTINATION NETNS     64 KiB over one connection
 *
 * A burst is SIZE packets, exchanges or blocks. Standard output: nanoseconds a burst, one number a line. FLOWS is a file
 * of source addresses in network order, each followed by a source port. NETNS is where DESTINATION listens: both ends
 * are this process, so a connection needs no second CPU and no scheduling.
 *
 * Everything between two virtual links happens inside the sender's system call (veth_xmit() queues to this CPU's
 * backlog, which is worked off as soon as bottom halves are enabled again), so the time of a burst is the sum of all
 * that its packets cost.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_packet.h>
#include <net/ethernet.h>
#include <net/if.h>
#include <netinet/ether.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BATCH = 64, BODY = 18, BLOCK = 65536, DISCARD = 9, PORT = 5001, HEADER_IPV4 = 20, HEADER_IPV6 = 40 };

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC_RAW, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static int is_ipv6(const char *address)
{
    return strchr(address, ':') != NULL;
}

static void binary(const char *text, void *address)
{
    if (inet_pton(is_ipv6(text) ? AF_INET6 : AF_INET, text, address) != 1)
        errx(2, "%s is no address", text);
}

static socklen_t endpoint(const char *text, uint16_t port, struct sockaddr_storage *name)
{
    memset(name, 0, sizeof *name);
    if (is_ipv6(text)) {
        struct sockaddr_in6 *six = (struct sockaddr_in6 *)name;
        six->sin6_family = AF_INET6;
        six->sin6_port = htons(port);
        binary(text, &six->sin6_addr);
        return sizeof *six;
    }
    struct sockaddr_in *four = (struct sockaddr_in *)name;
    four->sin_family = AF_INET;
    four->sin_port = htons(port);
    binary(text, &four->sin_addr);
    return sizeof *four;
}

/* SIZE messages, BATCH a system call. */
static void send_all(int sock, struct mmsghdr *messages, unsigned count)
{
    for (unsigned sent = 0; sent < count;) {
        int done = sendmmsg(sock, messages + sent, count - sent, 0);
        if (done < 0)
            err(2, "sendmmsg");
        sent += (unsigned)done;
    }
}

/* --- forwarded packets ------------------------------------------------------------------------------------------- */

struct flows {
    const uint8_t *records;
    size_t count, size, next;
};

static struct flows read_flows(const char *path, size_t size)
{
    int file = open(path, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) < 0)
        err(2, "%s", path);
    uint8_t *records = malloc((size_t)status.st_size);
    if (!records || read(file, records, (size_t)status.st_size) != status.st_size)
        err(2, "read %s", path);
    close(file);
    return (struct flows){.records = records, .count = (size_t)status.st_size / size, .size = size};
}

struct frame {
    struct ether_header ethernet;
    uint8_t bytes[HEADER_IPV6 + 8 + BODY];
} __attribute__((packed));

/* The sum of a header without options (RFC 1071). */
static void checksum(uint8_t *header)
{
    uint32_t sum = 0;
    uint16_t word;
    memset(header + 10, 0, 2);
    for (int at = 0; at < HEADER_IPV4; at += 2) {
        memcpy(&word, header + at, 2);
        sum += word;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    word = (uint16_t) ~(sum + (sum >> 16));
    memcpy(header + 10, &word, 2);
}

/* All but source address and port. Returns the frame's length. */
static size_t prepare(struct frame *frame, const struct ether_addr *to, const char *destination)
{
    size_t body = is_ipv6(destination) ? 0 : BODY; /* the shortest frame of IPv4 is padded to 60 bytes */
    size_t header = is_ipv6(destination) ? HEADER_IPV6 : HEADER_IPV4;
    uint16_t length = htons((uint16_t)(8 + body)), total = htons((uint16_t)(header + 8 + body)), port = htons(DISCARD);
    uint8_t *ip = frame->bytes;
    memset(frame, 0, sizeof *frame);
    memcpy(frame->ethernet.ether_dhost, to, ETH_ALEN);
    frame->ethernet.ether_shost[0] = 2;
    frame->ethernet.ether_type = htons(is_ipv6(destination) ? ETHERTYPE_IPV6 : ETHERTYPE_IP);
    if (is_ipv6(destination)) {
        ip[0] = 0x60;
        memcpy(ip + 4, &length, 2);
        ip[6] = IPPROTO_UDP;
        ip[7] = 64;
        binary(destination, ip + 24);
    } else {
        ip[0] = 0x45;
        memcpy(ip + 2, &total, 2);
        ip[8] = 64;
        ip[9] = IPPROTO_UDP;
        binary(destination, ip + 16);
    }
    memcpy(ip + header + 2, &port, 2); /* the UDP checksum stays 0: none */
    memcpy(ip + header + 4, &length, 2);
    return sizeof frame->ethernet + header + 8 + body;
}

static void address(struct frame *frame, struct flows *flows, int ipv6)
{
    const uint8_t *record = flows->records + flows->next * flows->size;
    flows->next = flows->next + 1 == flows->count ? 0 : flows->next + 1;
    memcpy(frame->bytes + (ipv6 ? 8 : 12), record, ipv6 ? 16 : 4);
    memcpy(frame->bytes + (ipv6 ? HEADER_IPV6 : HEADER_IPV4), record + (ipv6 ? 16 : 4), 2);
    if (!ipv6)
        checksum(frame->bytes);
}

static void forward(unsigned bursts, unsigned size, char **words)
{
    static struct frame frames[BATCH];
    static struct iovec parts[BATCH];
    static struct mmsghdr messages[BATCH];
    const char *link = words[0], *destination = words[2];
    int ipv6 = is_ipv6(destination), yes = 1;
    struct ether_addr *to = ether_aton(words[1]);
    struct flows flows = read_flows(words[3], ipv6 ? 18 : 6);
    struct sockaddr_ll name = {.sll_family = AF_PACKET, .sll_ifindex = (int)if_nametoindex(link)};
    int sock = socket(AF_PACKET, SOCK_RAW, 0); /* protocol 0: it hears nothing */
    if (!to || !flows.count)
        errx(2, "%s is no link-layer address, or there are no flows", words[1]);
    if (sock < 0 || bind(sock, (struct sockaddr *)&name, sizeof name) < 0 ||
        setsockopt(sock, SOL_PACKET, PACKET_QDISC_BYPASS, &yes, sizeof yes) < 0)
        err(2, "a packet socket on %s", link);
    for (int at = 0; at < BATCH; at++) {
        parts[at] = (struct iovec){&frames[at], prepare(&frames[at], to, destination)};
        messages[at].msg_hdr = (struct msghdr){.msg_iov = &parts[at], .msg_iovlen = 1};
    }
    while (bursts--) {
        uint64_t began = now();
        for (unsigned left = size; left;) {
            unsigned count = left < BATCH ? left : BATCH;
            for (unsigned at = 0; at < count; at++)
                address(&frames[at], &flows, ipv6);
            send_all(sock, messages, count);
            left -= count;
        }
        printf("%llu\n", (unsigned long long)(now() - began));
    }
}

/* --- local packets ----------------------------------------------------------------------------------------------- */

/* Who waits longer than two seconds for the other end of a wire waits in vain. */
static int open_bound(const char *source, uint16_t port, int kind)
{
    const struct timeval patience = {.tv_sec = 2};
    struct sockaddr_storage name;
    socklen_t length = endpoint(source, port, &name);
    int sock = socket(name.ss_family, kind, 0), yes = 1;
    if (sock < 0 || setsockopt(sock, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) < 0 ||
        setsockopt(sock, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) < 0 ||
        setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience) < 0 ||
        bind(sock, (struct sockaddr *)&name, length) < 0)
        err(2, "a socket of %s", source);
    return sock;
}

static void open_connection(int sock, const char *destination, uint16_t port)
{
    struct sockaddr_storage name;
    socklen_t length = endpoint(destination, port, &name);
    if (connect(sock, (struct sockaddr *)&name, length) < 0)
        err(2, "connect to %s", destination);
}

static void datagrams(unsigned bursts, unsigned size, char **words)
{
    static char body[BODY];
    struct iovec part = {body, sizeof body};
    static struct mmsghdr messages[BATCH];
    int sock = open_bound(words[0], 0, SOCK_DGRAM);
    open_connection(sock, words[1], DISCARD);
    for (int at = 0; at < BATCH; at++)
        messages[at].msg_hdr = (struct msghdr){.msg_iov = &part, .msg_iovlen = 1};
    while (bursts--) {
        uint64_t began = now();
        for (unsigned left = size; left;) {
            unsigned count = left < BATCH ? left : BATCH;
            send_all(sock, messages, count);
            left -= count;
        }
        printf("%llu\n", (unsigned long long)(now() - began));
    }
}

struct connection {
    int near, far;
};

static struct connection open_both(char **words)
{
    int yes = 1, home = open("/proc/self/ns/net", O_RDONLY), away = open(words[2], O_RDONLY);
    if (home < 0 || away < 0 || setns(away, CLONE_NEWNET) < 0)
        err(2, "enter %s", words[2]);
    int listener = open_bound(words[1], PORT, SOCK_STREAM);
    if (listen(listener, 1) < 0 || setns(home, CLONE_NEWNET) < 0)
        err(2, "listen on %s", words[1]);
    int near = open_bound(words[0], 0, SOCK_STREAM);
    open_connection(near, words[1], PORT);
    int far = accept(listener, NULL, NULL); /* inherits the listener's patience */
    if (far < 0 || setsockopt(near, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes) < 0 ||
        setsockopt(far, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes) < 0)
        err(2, "accept");
    return (struct connection){near, far};
}

static void carry_byte(int from, int to)
{
    char byte = 'x';
    if (send(from, &byte, 1, 0) != 1 || recv(to, &byte, 1, 0) != 1)
        err(2, "a byte over TCP");
}

static void exchanges(unsigned bursts, unsigned size, char **words)
{
    struct connection connection = open_both(words);
    while (bursts--) {
        uint64_t began = now();
        for (unsigned left = size; left; left--) {
            carry_byte(connection.near, connection.far);
            carry_byte(connection.far, connection.near);
        }
        printf("%llu\n", (unsigned long long)(now() - began));
    }
}

static void stream(unsigned bursts, unsigned size, char **words)
{
    static char block[BLOCK];
    struct connection connection = open_both(words);
    while (bursts--) {
        uint64_t began = now(), unsent = (uint64_t)size * BLOCK, unread = unsent;
        while (unread) {
            if (unsent) {
                ssize_t sent = send(connection.near, block, unsent < BLOCK ? unsent : BLOCK, MSG_DONTWAIT);
                if (sent < 0 && errno != EAGAIN)
                    err(2, "send over TCP");
                unsent -= sent > 0 ? (uint64_t)sent : 0;
            }
            ssize_t got = recv(connection.far, block, BLOCK, MSG_DONTWAIT);
            if (got < 0 && errno != EAGAIN)
                err(2, "receive over TCP");
            unread -= got > 0 ? (uint64_t)got : 0;
        }
        printf("%llu\n", (unsigned long long)(now() - began));
    }
}

int main(int count, char **words)
{
    static const struct {
        const char *name;
        int operands;
        void (*run)(unsigned bursts, unsigned size, char **operands);
    } kinds[] = {{"forward", 4, forward}, {"udp", 2, datagrams}, {"tcp-rr", 3, exchanges}, {"tcp", 3, stream}};
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    for (size_t at = 0; at < sizeof kinds / sizeof *kinds; at++) {
        if (count != 5 + kinds[at].operands || strcmp(words[1], kinds[at].name) != 0)
            continue;
        CPU_SET(atoi(words[2]), &cpus);
        if (sched_setaffinity(0, sizeof cpus, &cpus) < 0)
            err(2, "CPU %s", words[2]);
        kinds[at].run((unsigned)atoi(words[3]), (unsigned)atoi(words[4]), words + 5);
        return 0;
    }
    errx(2, "usage: see the top of traffic.c");
}
