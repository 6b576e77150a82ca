/* 64-byte ping-pong over loopback, both ends on one core: pingpong CPU SECONDS. Prints round trips per second, a line for
 * each slice of time. Or pingpong CPU PORT TRIPS: exactly so many, the server on this port.
 *
 * With both ends on one core a round trip is nothing but kernel work and two context switches, so that what a tracer
 * adds to each segment shows as fewer round trips. SCHED_FIFO keeps the machine's other work away from that core.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MESSAGE 64
#define WARM_UP_S 0.05
#define SLICE_S 0.02
#define BETWEEN_CLOCKS 32 /* round trips */

static void check(int ok, const char *what) {
  if (ok) return;
  perror(what);
  exit(1);
}

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void set_no_delay(int fd) {
  int one = 1;
  check(!setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)), "TCP_NODELAY");
}

static int receive(int fd, char *message) { /* 0: the other end closed */
  size_t n = 0;
  while (n < MESSAGE) {
    ssize_t got = read(fd, message + n, MESSAGE - n);
    check(got >= 0, "read");
    if (!got) return 0;
    n += (size_t)got;
  }
  return 1;
}

static void echo(int fd) {
  char message[MESSAGE];
  while (receive(fd, message)) check(write(fd, message, MESSAGE) == MESSAGE, "write");
}

static double trips_per_second(int fd, double seconds) {
  char message[MESSAGE] = {0};
  unsigned long trips = 0;
  double began = now_s(), now = began;
  while (now - began < seconds) {
    for (int i = 0; i < BETWEEN_CLOCKS; i++) {
      check(write(fd, message, MESSAGE) == MESSAGE, "write");
      check(receive(fd, message), "the other end closed");
    }
    trips += BETWEEN_CLOCKS;
    now = now_s();
  }
  return (double)trips / (now - began);
}

int main(int argc, char **argv) {
  check(argc == 3 || argc == 4, "usage: pingpong CPU SECONDS, or pingpong CPU PORT TRIPS");
  cpu_set_t core;
  CPU_ZERO(&core);
  CPU_SET(atoi(argv[1]), &core);
  check(!sched_setaffinity(0, sizeof(core), &core), "sched_setaffinity");
  struct sched_param priority = {.sched_priority = 1};
  if (sched_setscheduler(0, SCHED_FIFO, &priority)) perror("no SCHED_FIFO: the figures will be noisier");

  struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  if (argc == 4) address.sin_port = htons((uint16_t)atoi(argv[2]));
  socklen_t length = sizeof(address);
  int listener = socket(AF_INET, SOCK_STREAM, 0), client = socket(AF_INET, SOCK_STREAM, 0);
  int one = 1;
  check(listener >= 0 && client >= 0, "socket");
  check(!setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one)), "SO_REUSEADDR");
  check(!bind(listener, (struct sockaddr *)&address, length) && !listen(listener, 1), "listen");
  check(!getsockname(listener, (struct sockaddr *)&address, &length), "getsockname");
  check(!connect(client, (struct sockaddr *)&address, length), "connect");
  int server = accept(listener, NULL, NULL);
  check(server >= 0, "accept");
  set_no_delay(client);
  set_no_delay(server);

  pid_t child = fork();
  check(child >= 0, "fork");
  if (!child) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(client);
    echo(server);
    return 0;
  }
  close(server);
  if (argc == 4) {
    char message[MESSAGE] = {0};
    for (long left = atol(argv[3]); left; left--) {
      check(write(client, message, MESSAGE) == MESSAGE, "write");
      check(receive(client, message), "the other end closed");
    }
    return 0;
  }
  trips_per_second(client, WARM_UP_S);
  double end = now_s() + atof(argv[2]);
  while (now_s() < end) printf("%.1f\n", trips_per_second(client, SLICE_S));
  return 0;
}
