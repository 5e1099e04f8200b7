//! A port that is ours before it answers: taken early, so that a second server fails at once, but refusing connections until the model is ready.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage, bind, listen, setsockopt, socket, sockopt,
};
use nix::unistd::{Uid, User};

use crate::report::{Exit, Failure, Outcome};

/// A bound socket that does not listen yet.
pub(crate) struct Port {
    socket: OwnedFd,
    address: SocketAddr,
}

impl Port {
    /// Takes the port; 0 lets the system choose.
    pub(crate) fn bind(address: SocketAddr) -> Outcome<Self> {
        let socket = bound(address).map_err(|errno| {
            let text = format!("cannot take {address}");
            let failure = Failure::new(Exit::Preflight, anyhow::Error::new(io::Error::from(errno)).context(text));
            match errno {
                Errno::EADDRINUSE => {
                    let port = address.port();
                    let by = holder(port).map_or_else(String::new, |holder| format!(" by {holder}"));
                    failure.hint(format!("port {port} is in use{by}: choose another with --port, or --port 0 for any"))
                }
                Errno::EACCES => failure.hint("ports below 1024 are for root: choose another with --port"),
                Errno::EADDRNOTAVAIL => failure.hint("--host must be an address of this machine"),
                _ => failure,
            }
        })?;
        Ok(Self { socket, address })
    }

    /// From now on connections are accepted.
    pub(crate) fn listen(self) -> Outcome<TcpListener> {
        // Connections inherit it, so that the next run can take the port while old ones linger in TIME_WAIT. It is not set from the
        // beginning because two sockets that both have it could both take the port.
        let listening = setsockopt(&self.socket, sockopt::ReuseAddr, &true)
            .and_then(|()| listen(&self.socket, Backlog::MAXALLOWABLE));
        listening.map_err(|errno| {
            let text = format!("cannot listen on {}", self.address);
            Failure::new(Exit::Preflight, anyhow::Error::new(io::Error::from(errno)).context(text))
        })?;
        Ok(TcpListener::from(self.socket))
    }
}

/// Who listens on a port of this host, as far as the system tells: `user alice, pid 4711`.
fn holder(port: u16) -> Option<String> {
    const LISTENING: &str = "0A";
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|table| fs::read_to_string(table).unwrap_or_default());
    let (uid, inode) = tables.iter().flat_map(|table| table.lines()).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (_, local) = fields.get(1)?.rsplit_once(':')?;
        let is_it = u16::from_str_radix(local, 16) == Ok(port) && fields.get(3) == Some(&LISTENING);
        is_it.then_some((fields.get(7)?.parse::<u32>().ok()?, (*fields.get(9)?).to_owned()))
    })?;
    let user = User::from_uid(Uid::from_raw(uid)).ok().flatten().map_or_else(|| uid.to_string(), |user| user.name);
    // Only processes of this user can be looked into.
    let socket = format!("socket:[{inode}]");
    let holds = |process: &PathBuf| {
        let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().filter_map(Result::ok);
        descriptors.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|link| link.as_os_str() == socket.as_str())
    };
    // `self` is there besides the numbers.
    let is_number = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()).is_some();
    let mut processes = fs::read_dir("/proc").ok()?.filter_map(|entry| Some(entry.ok()?.path())).filter(is_number);
    let process = processes.find(holds);
    let pid = process.as_deref().and_then(Path::file_name).and_then(|pid| pid.to_str());
    Some(format!("user {user}{}", pid.map_or_else(String::new, |pid| format!(", pid {pid}"))))
}

fn bound(address: SocketAddr) -> Result<OwnedFd, Errno> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let address = SockaddrStorage::from(address);
    match bind(socket.as_raw_fd(), &address) {
        // Perhaps only connections of an ended server are left on it; whoever listens or has bound it exclusively still prevails.
        Err(Errno::EADDRINUSE) => {
            setsockopt(&socket, sockopt::ReuseAddr, &true)?;
            bind(socket.as_raw_fd(), &address)?;
        }
        other => other?,
    }
    Ok(socket)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::io::Read as _;
    use std::net::{Ipv4Addr, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn a_port_is_taken_before_it_answers() {
        let port = Port::bind((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address: SocketAddr = {
            let bound: SockaddrStorage = nix::sys::socket::getsockname(port.socket.as_raw_fd()).unwrap();
            (Ipv4Addr::LOCALHOST, bound.as_sockaddr_in().unwrap().port()).into()
        };
        assert_eq!(TcpStream::connect(address).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let refused = Port::bind(address).err().unwrap();
        assert_eq!(refused.exit, Exit::Preflight);
        assert!(refused.to_string().contains(&format!("port {} is in use", address.port())));

        let listener = port.listen().unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        let refused = Port::bind(address).err().unwrap();
        assert_eq!(refused.exit, Exit::Preflight);
        assert!(refused.to_string().contains(&format!(", pid {}:", std::process::id())), "{refused}");

        // The server closes first, so its side lingers in TIME_WAIT; the port can be taken again all the same.
        drop((listener.accept().unwrap(), listener));
        assert_eq!(client.read(&mut [0]).unwrap(), 0);
        drop(client);
        // A process that another test is just starting may hold copies of the sockets for a moment.
        let deadline = Instant::now() + Duration::from_secs(5);
        while Port::bind(address).and_then(Port::listen).is_err() {
            assert!(Instant::now() < deadline, "the port is still taken");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
