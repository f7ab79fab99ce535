use rustls::crypto::cipher::{AeadKey, Iv};

use super::*;

/// Both directions of one key.
fn pair(aead: Aead) -> (Direction, Direction) {
    let secrets = ConnectionTrafficSecrets::Aes256Gcm { key: AeadKey::from([7; 32]), iv: Iv::from([9; 12]) };
    let new = || Direction::new(0, &secrets, aead).expect("AES-GCM");
    (new(), new())
}

#[test]
fn what_is_sealed_is_opened_by_either_and_in_its_place_alone() {
    for (ours, theirs) in [(Aead::AwsLc, Aead::Ring), (Aead::Ring, Aead::AwsLc)] {
        let (mut send, _) = pair(ours);
        let (_, mut receive) = pair(theirs);
        let mut out = b"before".to_vec();
        for (n, kind) in [(0, Kind::Data), (1, Kind::Alert), (MAX_PLAIN, Kind::Data), (5, Kind::Handshake)] {
            let start = out.len();
            send.seal(kind, &mut out, |out| out.resize(out.len() + n, 3));
            let record = &mut out[start..];
            assert_eq!((record.len(), length(record)), (n + OVERHEAD, Ok(Some(n + OVERHEAD))));
            let mut late = record.to_vec();
            assert_eq!(receive.open(record), Ok((kind, n)));
            assert!(record[HEADER..HEADER + n].iter().all(|byte| *byte == 3));
            assert_eq!(receive.open(&mut late), Err(RecordError::Sealed), "a second time");
            // What was refused has counted; a connection ends with it.
            receive.sequence -= 1;
        }
        assert!(out.starts_with(b"before"));
    }
}

#[test]
fn nothing_of_a_record_can_be_changed() {
    let mut sealed = Vec::new();
    pair(Aead::AwsLc).0.seal(Kind::Data, &mut sealed, |out| out.extend_from_slice(b"content"));
    for at in 0..sealed.len() {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        assert_eq!(pair(Aead::AwsLc).1.open(&mut changed), Err(RecordError::Sealed), "byte {at}");
    }
    assert_eq!(pair(Aead::AwsLc).1.open(&mut sealed), Ok((Kind::Data, 7)));
}

#[test]
fn padding_is_taken_off_and_content_needs_a_type() {
    let open = |content: &[u8]| {
        let (mut send, mut receive) = pair(Aead::AwsLc);
        let mut record = vec![Kind::Data as u8, 3, 3, 0, 0];
        record.extend_from_slice(content);
        let sealed = (content.len() + TAG) as u16;
        record[3..HEADER].copy_from_slice(&sealed.to_be_bytes());
        let nonce = send.nonce();
        let (header, inner) = record.split_at_mut(HEADER);
        let tag = send.key.seal(nonce, header, inner);
        record.extend_from_slice(&tag);
        receive.open(&mut record)
    };
    assert_eq!(open(b"abc\x17"), Ok((Kind::Data, 3)));
    assert_eq!(open(b"abc\x17\0\0\0"), Ok((Kind::Data, 3)));
    assert_eq!(open(b"\x15"), Ok((Kind::Alert, 0)));
    for nothing in [&b""[..], b"\0\0\0", b"abc\x14", b"abc\x63"] {
        assert_eq!(open(nothing), Err(RecordError::Content), "{nothing:?}");
    }
    let long = [&vec![1; MAX_PLAIN + 1][..], &[Kind::Data as u8]].concat();
    assert_eq!(open(&long), Err(RecordError::Long(MAX_PLAIN + 2)));
    let padded = [&vec![1; MAX_PLAIN][..], &[Kind::Data as u8, 0]].concat();
    assert_eq!(open(&padded), Err(RecordError::Long(MAX_PLAIN + 2)), "with its padding");
    assert_eq!(open(&padded[..=MAX_PLAIN]), Ok((Kind::Data, MAX_PLAIN)));
}

#[test]
fn lengths_are_told_from_headers() {
    assert_eq!(length(&[]), Ok(None));
    assert_eq!(length(&[23, 3, 3, 0]), Ok(None));
    assert_eq!(length(&[23, 3, 3, 0, 17]), Ok(Some(22)));
    assert_eq!(length(&[23, 3, 3, 0x41, 0]), Ok(Some(HEADER + MAX_SEALED)));
    assert_eq!(length(&[23, 3, 3, 0x41, 1]), Err(RecordError::Long(MAX_SEALED + 1)));
    for kind in [0, 20, 21, 22, 24, b'G'] {
        assert_eq!(length(&[kind, 3, 3, 0, 17]), Err(RecordError::Outer(kind)));
    }
}

#[test]
fn a_key_is_worn_before_its_limit() {
    let (mut send, _) = pair(Aead::AwsLc);
    send.sequence = MAX_RECORDS - 1;
    assert!(!send.is_worn());
    send.seal(Kind::Data, &mut Vec::new(), |_| {});
    assert!(send.is_worn());
}
