//! Records of TLS 1.3 (RFC 8446 section 5) with AES-GCM: sealed where they are to be sent from, opened where they were received.
//!
//! Owns lengths, nonces, sequence numbers and content types. Has no socket and makes no keys: those come from the handshake and
//! from key updates, both rustls's. Whose AES-GCM it is, is [`crate::provider`]'s choice.

use rustls::ConnectionTrafficSecrets;

use crate::provider::Aead;

/// Type, version and length.
pub(crate) const HEADER: usize = 5;
/// Bytes of one record (RFC 8446 section 5.1).
pub(crate) const MAX_PLAIN: usize = 16 * 1024;
/// What sealing adds to a record: the header, the type and the tag.
pub(crate) const OVERHEAD: usize = HEADER + 1 + TAG;
const TAG: usize = 16;
/// Bytes after a header (RFC 8446 section 5.2).
const MAX_SEALED: usize = MAX_PLAIN + 256;
/// Records under one key, below the limit for AES-GCM (RFC 8446 section 5.5).
const MAX_RECORDS: u64 = 1 << 23;

/// What a record carries (RFC 8446 section 5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Alert = 21,
    Handshake = 22,
    Data = 23,
}

impl Kind {
    fn of(byte: u8) -> Option<Self> {
        [Self::Alert, Self::Handshake, Self::Data].into_iter().find(|kind| *kind as u8 == byte)
    }
}

/// Why bytes are no record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    /// Not what may come after a handshake.
    #[error("a record of type {0}; expected encrypted data (23)")]
    Outer(u8),
    /// Longer than a record may be, before or after opening.
    #[error("a record of {0} bytes; expected at most {MAX_SEALED}, and {MAX_PLAIN} of data")]
    Long(usize),
    /// Its tag is wrong: it was changed, or sealed with another key.
    #[error("a record that cannot be decrypted")]
    Sealed,
    /// Its content is of no type that there is.
    #[error("a record with content of no known type")]
    Content,
}

impl RecordError {
    /// The description that the peer is told (RFC 8446 section 6.2).
    pub(crate) fn alert(self) -> u8 {
        match self {
            Self::Outer(_) | Self::Content => 10,
            Self::Long(_) => 22,
            Self::Sealed => 20,
        }
    }
}

/// No key can be made of what rustls has agreed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a cipher that is not AES-GCM was agreed")]
pub(crate) struct OtherCipher;

enum Key {
    AwsLc(aws_lc_rs::aead::LessSafeKey),
    // Half a kilobyte in itself, and connections are moved about.
    Ring(Box<ring::aead::LessSafeKey>),
}

/// One direction of a connection.
pub(crate) struct Direction {
    key: Key,
    iv: [u8; 12],
    /// Records so far, under this key.
    sequence: u64,
}

impl Direction {
    /// A direction that has had so many records.
    pub(crate) fn new(sequence: u64, secrets: &ConnectionTrafficSecrets, aead: Aead) -> Result<Self, OtherCipher> {
        let (ConnectionTrafficSecrets::Aes128Gcm { key, iv } | ConnectionTrafficSecrets::Aes256Gcm { key, iv }) =
            secrets
        else {
            return Err(OtherCipher);
        };
        let key = Key::new(key.as_ref(), aead).ok_or(OtherCipher)?;
        let iv = iv.as_ref().try_into().map_err(|_| OtherCipher)?;
        Ok(Self { key, iv, sequence })
    }

    /// Whether the next record is to be under another key.
    pub(crate) fn is_worn(&self) -> bool {
        self.sequence >= MAX_RECORDS
    }

    #[cfg(test)]
    pub(crate) fn sequence(&self) -> u64 {
        self.sequence
    }

    /// As if it had sealed all the records that its key may.
    #[cfg(test)]
    pub(crate) fn wear(&mut self) {
        self.sequence = MAX_RECORDS;
    }

    /// The next nonce (RFC 8446 section 5.3).
    fn nonce(&mut self) -> [u8; 12] {
        let mut nonce = self.iv;
        for (byte, of) in nonce[4..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= of;
        }
        self.sequence += 1;
        nonce
    }

    /// Appends a record to `out`. `content` appends what it carries, at most [`MAX_PLAIN`] bytes.
    pub(crate) fn seal(&mut self, kind: Kind, out: &mut Vec<u8>, content: impl FnOnce(&mut Vec<u8>)) {
        let start = out.len();
        out.extend_from_slice(&[Kind::Data as u8, 3, 3, 0, 0]);
        content(out);
        out.push(kind as u8);
        let sealed = out.len() - start - HEADER + TAG;
        // At most MAX_SEALED, which fits.
        out[start + 3..start + HEADER].copy_from_slice(&(sealed as u16).to_be_bytes());
        let nonce = self.nonce();
        let (header, content) = out[start..].split_at_mut(HEADER);
        let tag = self.key.seal(nonce, header, content);
        out.extend_from_slice(&tag);
    }

    /// Opens a whole record, header included; what it carries is then `record[HEADER..HEADER + n]`.
    pub(crate) fn open(&mut self, record: &mut [u8]) -> Result<(Kind, usize), RecordError> {
        let nonce = self.nonce();
        let (header, sealed) = record.split_at_mut(HEADER);
        let opened = self.key.open(nonce, header, sealed).ok_or(RecordError::Sealed)?;
        if opened.len() > MAX_PLAIN + 1 {
            return Err(RecordError::Long(opened.len()));
        }
        // Zeros after the type hide how long the content is.
        let at = opened.iter().rposition(|byte| *byte != 0).ok_or(RecordError::Content)?;
        let kind = Kind::of(opened[at]).ok_or(RecordError::Content)?;
        Ok((kind, at))
    }
}

impl Key {
    fn new(key: &[u8], aead: Aead) -> Option<Self> {
        Some(match (aead, key.len()) {
            (Aead::AwsLc, length) => {
                use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, LessSafeKey, UnboundKey};
                let of = if length == 16 { &AES_128_GCM } else { &AES_256_GCM };
                Self::AwsLc(LessSafeKey::new(UnboundKey::new(of, key).ok()?))
            }
            (Aead::Ring, length) => {
                use ring::aead::{AES_128_GCM, AES_256_GCM, LessSafeKey, UnboundKey};
                let of = if length == 16 { &AES_128_GCM } else { &AES_256_GCM };
                Self::Ring(Box::new(LessSafeKey::new(UnboundKey::new(of, key).ok()?)))
            }
        })
    }

    fn seal(&self, nonce: [u8; 12], header: &[u8], content: &mut [u8]) -> [u8; TAG] {
        let mut tag = [0; TAG];
        match self {
            Self::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce};
                let nonce = Nonce::assume_unique_for_key(nonce);
                // Fails only for contents of many gigabytes.
                #[allow(clippy::expect_used, reason = "a record is at most 16 KiB")]
                let made = key.seal_in_place_separate_tag(nonce, Aad::from(header), content).expect("a short record");
                tag.copy_from_slice(made.as_ref());
            }
            Self::Ring(key) => {
                use ring::aead::{Aad, Nonce};
                let nonce = Nonce::assume_unique_for_key(nonce);
                #[allow(clippy::expect_used, reason = "a record is at most 16 KiB")]
                let made = key.seal_in_place_separate_tag(nonce, Aad::from(header), content).expect("a short record");
                tag.copy_from_slice(made.as_ref());
            }
        }
        tag
    }

    fn open<'a>(&self, nonce: [u8; 12], header: &[u8], sealed: &'a mut [u8]) -> Option<&'a [u8]> {
        match self {
            Self::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce};
                key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(header), sealed).ok().map(|o| &*o)
            }
            Self::Ring(key) => {
                use ring::aead::{Aad, Nonce};
                key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(header), sealed).ok().map(|o| &*o)
            }
        }
    }
}

/// The length of the record that begins here, header included; `None` where too little of it is there to tell.
pub(crate) fn length(bytes: &[u8]) -> Result<Option<usize>, RecordError> {
    let [kind, _, _, high, low, ..] = *bytes else { return Ok(None) };
    let sealed = usize::from(u16::from_be_bytes([high, low]));
    match () {
        () if kind != Kind::Data as u8 => Err(RecordError::Outer(kind)),
        () if sealed > MAX_SEALED => Err(RecordError::Long(sealed)),
        () => Ok(Some(HEADER + sealed)),
    }
}

#[cfg(test)]
mod tests;
