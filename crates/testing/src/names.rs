//! The name server of the example's cluster: a few names that tests need, in a namespace of its own.
//!
//! `outside.test` is 192.0.2.7; `A-B-C-D.names.test` is A.B.C.D, and with `--` between them a name has several addresses;
//! others are given by tests.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::{Mutex, PoisonError};

use crate::topology::Host;
use crate::{Doing, Failure};

/// Seconds for which an answer holds.
const TTL: u32 = 2;

/// Names that a test has given an address; a process is one test.
static GIVEN: Mutex<BTreeMap<String, Ipv4Addr>> = Mutex::new(BTreeMap::new());

/// Gives a name an address from now on, in place of another one.
pub fn give(name: &str, address: Ipv4Addr) {
    GIVEN.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), address);
}

/// Answers for ever, on port 53 of a host.
pub(crate) fn serve(control: &Host) -> Result<(), Failure> {
    let socket = control.netns.run(|| UdpSocket::bind((control.ip, 53))).doing("name server")?.doing("name server")?;
    std::thread::spawn(move || {
        let mut buf = [0; 1500];
        while let Ok((n, from)) = socket.recv_from(&mut buf) {
            if let Some(answer) = answer(&buf[..n]) {
                // Whoever has asked asks again.
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    Ok(())
}

/// The answer to a query of one question (RFC 1035 section 4).
fn answer(query: &[u8]) -> Option<Vec<u8>> {
    let (mut labels, mut at) = (Vec::new(), 12);
    loop {
        let length = usize::from(*query.get(at)?);
        at += 1;
        if length == 0 {
            break;
        }
        labels.push(String::from_utf8_lossy(query.get(at..at + length)?).to_lowercase());
        at += length;
    }
    let (kind, end) = (query.get(at..at + 2)?, at + 4);
    let name = labels.join(".");
    let given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner).get(&name).copied();
    let known: Option<Vec<Ipv4Addr>> = match name.as_str() {
        _ if given.is_some() => given.map(|address| vec![address]),
        "outside.test" => Some(vec![Ipv4Addr::new(192, 0, 2, 7)]),
        _ => name
            .strip_suffix(".names.test")
            .map(|n| n.split("--").filter_map(|a| a.replace('-', ".").parse().ok()).collect()),
    };
    let code = if known.is_some() { 0 } else { 3 };
    let addresses: Vec<Ipv4Addr> = known.unwrap_or_default().into_iter().filter(|_| kind == [0, 1]).collect();
    let mut out = query.get(..end)?.to_vec();
    (out[2], out[3]) = (0x84, code);
    out[4..12].copy_from_slice(&[0, 1, 0, addresses.len() as u8, 0, 0, 0, 0]);
    for address in addresses {
        out.extend([0xc0, 12, 0, 1, 0, 1]);
        out.extend(TTL.to_be_bytes());
        out.extend([0, 4]);
        out.extend(address.octets());
    }
    Some(out)
}
