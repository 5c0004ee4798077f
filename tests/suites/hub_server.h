// A small HTTP server on this machine that plays the Hub in tests.
#pragma once
#include <atomic>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

struct HubRequest {
  std::string path, range, authorization;
};
struct HubReply {
  int status = 200;
  std::string body;
  std::map<std::string, std::string> headers;
  bool ranges = true;                   // a Range header is honoured
  std::size_t cut = std::string::npos;  // bytes of the body after which the connection is dropped
};

/// Answers one connection after the other, each with one request.
class HubServer {
 public:
  using Handler = std::function<HubReply(const HubRequest&)>;
  explicit HubServer(Handler handler)
      : handler_(std::move(handler)), socket_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t length = sizeof address;
    auto* a = reinterpret_cast<sockaddr*>(&address);  // NOLINT: the sockets' own way
    if (::bind(socket_, a, length) != 0 || ::listen(socket_, 16) != 0 ||
        ::getsockname(socket_, a, &length) != 0)
      throw std::runtime_error("the test's server does not start");
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this] { serve(); });
  }
  HubServer(const HubServer&) = delete;
  HubServer& operator=(const HubServer&) = delete;
  ~HubServer() {
    stopping_ = true;
    ::shutdown(socket_, SHUT_RDWR);
    thread_.join();
    ::close(socket_);
  }
  std::string url(const std::string& host = "127.0.0.1") const {
    return "http://" + host + ":" + std::to_string(port_);
  }
  std::vector<HubRequest> requests() const {
    const std::lock_guard lock(mutex_);
    return requests_;
  }

 private:
  void serve() {
    while (!stopping_) {
      const int client = ::accept(socket_, nullptr, nullptr);
      if (client < 0) continue;
      answer(client);
      ::close(client);
    }
  }
  static std::string header(const std::string& head, const std::string& name) {
    const auto at = head.find("\r\n" + name + ": ");
    if (at == std::string::npos) return "";
    const auto from = at + name.size() + 4;
    return head.substr(from, head.find("\r\n", from) - from);
  }
  void answer(int client) {
    std::string head;
    char c = 0;
    while (!head.ends_with("\r\n\r\n") && ::recv(client, &c, 1, 0) == 1) head += c;
    if (!head.starts_with("GET ")) return;
    const HubRequest request{head.substr(4, head.find(' ', 4) - 4), header(head, "Range"),
                             header(head, "Authorization")};
    {
      const std::lock_guard lock(mutex_);
      requests_.push_back(request);
    }
    HubReply reply = handler_(request);
    if (reply.status == 200 && reply.ranges && request.range.starts_with("bytes=")) {
      const std::size_t from = std::stoul(request.range.substr(6));
      reply.status = from < reply.body.size() ? 206 : 416;
      reply.headers["Content-Range"] = "bytes " + std::to_string(from) + "-" +
                                       std::to_string(reply.body.size() - 1) + "/" +
                                       std::to_string(reply.body.size());
      reply.body = from < reply.body.size() ? reply.body.substr(from) : "";
    }
    std::string text =
        "HTTP/1.1 " + std::to_string(reply.status) + " Said\r\nConnection: close\r\n";
    for (const auto& [name, value] : reply.headers) text += name + ": " + value + "\r\n";
    text += "Content-Length: " + std::to_string(reply.body.size()) + "\r\n\r\n";
    text += reply.body.substr(0, reply.cut);
    for (std::string_view rest = text; !rest.empty();) {
      const ssize_t n = ::send(client, rest.data(), rest.size(), MSG_NOSIGNAL);
      if (n <= 0) return;
      rest.remove_prefix(static_cast<std::size_t>(n));
    }
  }

  Handler handler_;
  int socket_;
  int port_ = 0;
  std::atomic<bool> stopping_{false};
  mutable std::mutex mutex_;
  std::vector<HubRequest> requests_;
  std::thread thread_;
};
