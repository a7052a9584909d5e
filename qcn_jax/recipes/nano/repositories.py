"""The source distributions that tasks are made from, each with its SHA-256; training and held-out never mix.

All are pure Python, carry their tests, and pass them with plain pytest on Python 3.11 without further packages.
HELDOUT serves evaluation alone: no tokenizer, corpus, trajectory or reward may come from it.
"""

# None of these was read by the packaged base: a repair that it knows by heart teaches nothing about other code.
TRAIN: dict[str, str] = {
    "rfc3986==2.0.0": "97aacf9dbd4bfd829baad6e6309fa6573aaf1be3f6fa735c8ab05e46cecb261c",
    "configobj==5.0.9": "03c881bbf23aa07bccf1b837005975993c4ab4427ba57f959afdd9d1a2386848",
    "uritemplate==4.2.0": "480c2ed180878955863323eea31b0ede668795de182617fef9c6ca09e6ec9d0e",
    "pyasn1==0.6.5": "6b11616a6bcf3a40e635f082bb232fa57b5e0dd7f517bd7ddd69ec3794508a47",
    "PyJWT==2.15.1": "4f259e80cdfb6b3fc18a7de51fd1ef9ec79652f25019bae68975ca2468a34df8",
    "addict==2.4.0": "b3b2210e0e067a281f5646c8c5db92e99b7231ea8b0eb5f74dbdf9e259d4e494",
    "parsimonious==0.11.0": "e080377d98957beec053580d38ae54fcdf7c470fb78670ba4bf8b5f9d5cad2a9",
    "bottle==0.13.4": "787e78327e12b227938de02248333d788cfe45987edca735f8f88e03472c3f47",
    "webob==1.8.11": "aa8c27231070b135c025e567a9cd7eda03f4df71352ffaac740cb6a75f0f81a5",
    "xlwt==1.3.0": "c59912717a9b28f1a3c2a98fd60741014b06b043936dcecbc113eaaada156c88",
    "ijson==3.6.0": "ec8f9265524e724905ecf00bdd061c374baaa8d5045ef50425695fb06efb45f5",
    "demjson3==3.0.6": "37c83b0c6eb08d25defc88df0a2a4875d58a7809a9650bd6eee7afd8053cdbac",
    "pystache==0.6.4": "e02902233049b16e0be1a94f0c7389e805625f6735783f4533b020b5a38a27c7",
    "hyperframe==6.1.0": "f630908a00854a7adeabd6382b43923a4c4cd4b821fcb527e6ab9e15382a3b08",
    "munch==4.0.0": "542cb151461263216a4e37c3fd9afc425feeaf38aaa3025cd2a981fadb422235",
    "ordered-set==4.1.0": "694a8e44c87657c59292ede72891eb91d34131f6531463aab3009191c77364a8",
    "marko==2.2.4": "c042c66f835425673123d7536b39b4660de3b68e30078c70fd26245b31170683",
    "textfsm==2.1.0": "45c18ff2b7c90163dfdff7e20d3f482514cc7aac26bc2547744e79dfa761e458",
    "crccheck==1.3.1": "1544c0110bf0a697d875d4f29dc40d7079f9d4d402a9317383f55f90ca72563a",
}

HELDOUT: dict[str, str] = {
    "boltons==26.2.0": "d39cfd15c1a1c3bd4d705c82252fa9edb8e4f5e8cc039f8e39afac7b1b47e92c",
    "tabulate==0.10.0": "e2cfde8f79420f6deeffdeda9aaec3b6bc5abce947655d17ac662b126e48a60d",
    "inflection==0.5.1": "1a29730d366e996aaacffb2f1f1cb9593dc38e2ddd30c91250c6dde09ea9b417",
    "isodate==0.7.2": "4cd1aa0f43ca76f4a6c6c0292a85f40b35ec2e43e315b59f06e6d32171a953e6",
    "parse==1.22.4": "706d458feed5a81b02768d3156e8070baf6cee7d150a3a3c0cd43101a875c3b5",
    "schema==0.7.8": "e86cc08edd6fe6e2522648f4e47e3a31920a76e82cce8937535422e310862ab5",
    "xmltodict==1.0.4": "6d94c9f834dd9e44514162799d344d815a3a4faec913717a9ecbfa5be1bb8e61",
}

# Repositories whose functions the packaged base has learned to repair, in all of its phases (configs/nano_base.py).
BASE: dict[str, str] = {
    "toolz==1.2.0": "9667a038e9d6ecba37995e26cb2f59ec6420b6ad8dd9677de59db9b956b08490",
    "sqlparse==0.6.1": "ca722573f848ff2d30e40ea30f53a104b7dea7635ea9285891263eb2c58fb6e7",
    "cachetools==8.0.1": "deb1d376d4d28c2f33f3e3058043b005e0af75c35c094bd54053e27d2906ad95",
    "pyflakes==4.1.0": "592beb57058eb82eb190fb7514f2081c555c51000b029ff71286a681e6cf2f83",
    "tinydb==4.9.0": "6928b1fa785186bda7952a0ba05aaeedc883ede565ca9c7d608de44e5e75de70",
    "voluptuous==0.16.0": "006535e22fed944aec17bef6e8725472476194743c87bd233e912eb463f8ff05",
    "simpleeval==1.0.8": "b417f869c11f2de034eb919820a825f35d12ce99f63a43971947ce73679eb9ba",
    "h11==0.16.0": "4e35b956cf45792e4caa5885e69fba00bdbc6ffafbfa020300e549b208ee5ff1",
    "webcolors==25.10.0": "62abae86504f66d0f6364c2a8520de4a0c47b80c03fc3a5f1815fedbef7c19bf",
    "mistune==3.4.0": "2eaf7952af928ca8d33b779762effc1da517b62c6ad85ec8ca957e3b07b9782a",
    "unidiff==1.0.1": "d9425bc516390c54743a1045b2c1c97f02d245a913a241dd499f958adb2df998",
    "tomlkit==0.15.2": "83e32755ba1d20d9340bd069ee97e9f6232ba2346b63ffcba425de01f7e327a6",
    "pathspec==1.1.1": "17db5ecd524104a120e173814c90367a96a98d07c45b2e10c2f3919fff91bf5a",
}

# Further ones of its phase `wide`: read as text, never executed.
PRETRAIN: dict[str, str] = {
    "ansible-core==2.18.1": "14cac1f92bbdae881cb0616eddeb17925e8cb507e486087975e724533d9de74f",
    "arrow==1.3.0": "d4540617648cb5f895730f1ad8c82a65f2dad0166f57b75f3ca54759c4d67a85",
    "astroid==3.3.6": "6aaea045f938c735ead292204afdb977a36e989522b7833ef6fea94de743f442",
    "attrs==24.2.0": "5cfb1b9148b5b086569baec03f20d7b6bf3bcacc9a42bebf87ffaaca362f6346",
    "beautifulsoup4==4.12.3": "74e3d1928edc070d21748185c46e3fb33490f22f52a3addee9aee0f4f7781051",
    "celery==5.4.0": "504a19140e8d3029d5acad88330c541d4c3f64c789d85f94756762d8bca7e706",
    "construct==2.10.70": "4d2472f9684731e58cc9c56c463be63baa1447d674e0d66aeb5627b22f512c29",
    "Django==5.2": "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89",
    "dnspython==2.7.0": "ce9c432eda0dc91cf618a5cedf1a4e142651196bbcd2c80e89ed5a907e5cfaf1",
    "docutils==0.21.2": "3a6b18732edf182daa3cd12775bbb338cf5691468f91eeeb109deff6ebfa986f",
    "fonttools==4.55.3": "3983313c2a04d6cc1fe9251f8fc647754cf49a61dac6cb1e7249ae67afaafc45",
    "hypothesis==6.122.3": "f4c927ce0ec739fa6266e4572949d0b54e24a14601a2bc5fec8f78e16af57918",
    "jedi==0.19.2": "4770dc3de41bde3966b02eb84fbcf557fb33cce26ad23da12c742fb50ecb11f0",
    "Jinja2==3.1.4": "4a3aee7acbbe7303aede8e9648d13b8bf88a429282aa6122a993f0ac800cb369",
    "kombu==5.4.2": "eef572dd2fd9fc614b37580e3caeafdd5af46c1eff31e7fba89138cdb406f2cf",
    "lark==1.2.2": "ca807d0162cd16cef15a8feecb862d7319e7a09bdb13aef927968e45040fed80",
    "marshmallow==3.23.1": "3a8dfda6edd8dcdbf216c0ede1d1e78d230a6dc9c5a088f58c4083b974a0d468",
    "mido==1.3.3": "1aecb30b7f282404f17e43768cbf74a6a31bf22b3b783bdd117a1ce9d22cb74c",
    "mpmath==1.3.0": "7a28eb2a9774d00c7bc92411c19a89209d5da7c4c9a9e227be8330a23a25b91f",
    "mypy==1.13.0": "0291a61b6fbf3e6673e3405cfcc0e7650bebc7939659fdca2702958038bd835e",
    "networkx==3.4.2": "307c3669428c5362aab27c8a1260aa8f47c4e91d3891f48be0141738d8d053e1",
    "nltk==3.9.1": "87d127bd3de4bd89a4f81265e5fa59cb1b199b27440175370f7417d2bc7ae868",
    "paramiko==3.5.0": "ad11e540da4f55cedda52931f1a3f812a8238a7af7f62a60de538cd80bb28124",
    "parso==0.8.4": "eb3a7b58240fb99099a345571deecc0f9540ea5f4dd2fe14c2a99d6b281ab92d",
    "peewee==3.17.8": "ce1d05db3438830b989a1b9d0d0aa4e7f6134d5f6fd57686eeaa26a3e6485a8c",
    "ply==3.11": "00c7c1aaa88358b9c765b6d3000c6eec0ba42abca5351b095321aef446081da3",
    "pylint==3.3.2": "9ec054ec992cd05ad30a6df1676229739a73f8feeabf3912c995d17601052b01",
    "pyparsing==3.2.0": "cbf74e27246d595d9a74b186b810f6fbb86726dbf3b9532efb343f6d7294fe9c",
    "pytest==8.3.4": "965370d062bce11e73868e0335abac31b4d3de0e82f4007408d242b4f8610761",
    "python-dateutil==2.9.0": "78e73e19c63f5b20ffa567001531680d939dc042bf7850431877645523c66709",
    "rdflib==7.1.1": "164de86bd3564558802ca983d84f6616a4a1a420c7a17a8152f5016076b2913e",
    "requests==2.32.3": "55365417734eb18255590a9ff9eb97e9e1da868d4ccd6402399eaf68af20a760",
    "rich==13.9.4": "439594978a49a09530cff7ebc4b5c7103ef57baf48d5ea3184f21d9a2befa098",
    "Scrapy==2.12.0": "d66d6e76009b12447604196875a463b61d10721140032a8084a0a52df7f4788f",
    "SQLAlchemy==2.0.36": "7f2767680b6d2398aea7082e45a774b2b0767b5c8d8ffb9c8b683088ea9b29c5",
    "SQLObject==3.12.0": "f2f6f69d1bcc497bea31237be7c72368d0f83ee519f334ae26fecad91e221914",
    "sympy==1.13.3": "b27fd2c6530e0ab39e275fc9b683895367e51d5da91baa8d3d64db2565fec4d9",
    "tornado==6.4.2": "92bad5b4746e9879fd7bf1eb21dce4e3fc5128d71601f80005afa39237ad620b",
    "Twisted==24.11.0": "695d0556d5ec579dcc464d2856b634880ed1319f45b10d19043f2b57eb0115b5",
    "urllib3==2.2.3": "e7d814a81dad81e6caf2ec9fdedb284ecc9c73076b62654547cc64ccdcae26e9",
    "Werkzeug==3.1.3": "60723ce945c19328679790e3282cc758aa4a6040e4bb330f53d30fa546d44746",
    "zope.interface==7.2": "8b49f1a3d1ee4cdaf5b32d2e738362c7f5e40ac8b46dd7d1a65e82a4872728fe",
}


def pinned(*names: str) -> tuple[str, ...]:
    """Those of the repositories above, with their hashes, as `config.tasks` takes them."""
    known = TRAIN | HELDOUT | BASE | PRETRAIN
    return tuple(f"{name}#sha256={known[name]}" for name in names)
